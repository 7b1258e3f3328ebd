"""symbreak."""
