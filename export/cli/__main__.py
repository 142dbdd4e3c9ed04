"""``python -m export.cli``."""

import sys

from export.cli.main import main

sys.exit(main())
