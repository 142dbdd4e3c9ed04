"""``python -m train.embedded.digits_ve OUT``."""

import sys

from mope_deploy.console import run_app
from train.embedded.digits_ve.cli import app

if __name__ == "__main__":
    sys.exit(run_app(app))
