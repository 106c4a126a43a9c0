"""python -m fastscore: the same as the command `fastscore`."""

import sys

from fastscore.cli import main

if __name__ == "__main__":
    sys.exit(main())
