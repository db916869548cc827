"""``python -m taid`` and ``taid``: a command, and the end of its process."""

import os
import sys
from collections.abc import Sequence

from taid.cli import main
from taid.training import engines


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. One of several processes ends here."""
    status = main.main(arguments)
    if "LOCAL_RANK" in os.environ:
        engines.leave(status)
    return status


if __name__ == "__main__":
    sys.exit(run())
