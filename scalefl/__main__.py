"""`python -m scalefl` and `accelerate launch -m scalefl` do what the `scalefl` command does."""

import sys

from scalefl.cli import main

if __name__ == "__main__":
    sys.exit(main())
