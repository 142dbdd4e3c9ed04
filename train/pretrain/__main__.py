"""``python -m train.pretrain vit|bert``."""

import sys

from train.pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
