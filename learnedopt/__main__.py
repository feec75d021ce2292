"""``python -m learnedopt``."""

import sys

from learnedopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
