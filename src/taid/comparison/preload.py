"""Import the libraries once, in the process from which :mod:`taid.comparison.workers` forks its own."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in cli.main: it warns of a kernel that it lacks

from taid.evaluation import evaluate  # noqa: E402
from taid.training import trainer  # noqa: E402

__all__ = ["evaluate", "trainer"]
