"""Data sets, read as streams of float32 batches."""
