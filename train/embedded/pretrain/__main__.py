"""``python -m train.embedded.pretrain vit|bert``."""

import sys

from train.embedded.pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
