"""``python -m taid`` is the command ``taid``."""

import sys

from taid.cli import main

sys.exit(main())
