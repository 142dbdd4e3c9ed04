"""``python -m train.digits_ve OUT``."""

import sys

from train.digits_ve.cli import main

if __name__ == "__main__":
    sys.exit(main())
