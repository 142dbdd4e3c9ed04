"""``python -m train.embedded.digits_ve OUT``."""

import sys

from train.embedded.digits_ve.cli import main

if __name__ == "__main__":
    sys.exit(main())
