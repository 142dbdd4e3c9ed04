"""``python -m export.cli``, the same as ``mope-export``."""

import sys

from mope_deploy.entry import mope_export

sys.exit(mope_export())
