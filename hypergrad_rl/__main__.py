"""``python -m hypergrad_rl``."""

import sys

from hypergrad_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())
