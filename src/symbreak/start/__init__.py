"""The late start: a shorter schedule, and a law that is good enough at its first level."""
