"""``python -m train.embedded.pretrain vit|bert``."""

import sys

from mope_deploy.console import run_app
from train.embedded.pretrain.cli import app

if __name__ == "__main__":
    sys.exit(run_app(app))
