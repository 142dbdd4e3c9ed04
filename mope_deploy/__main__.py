"""``python -m mope_deploy``: the command ``mope``, where no script of that name is on the path."""

import sys

from mope_deploy.entry import mope

if __name__ == "__main__":
    sys.exit(mope())
