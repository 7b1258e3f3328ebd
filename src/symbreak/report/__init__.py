"""Records, and how they are drawn. Draws, never computes."""
