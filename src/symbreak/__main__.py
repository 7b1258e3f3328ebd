"""``python -m symbreak``."""

from symbreak.cli import main

if __name__ == "__main__":
    main()
