"""``python -m train``, the same as ``mope-train``."""

import sys

from mope_deploy.entry import mope_train

if __name__ == "__main__":
    sys.exit(mope_train())
