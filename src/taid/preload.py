"""What the process loads once that :mod:`taid.workers` forks its own from."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in cli.main: it warns of a kernel that it lacks

from taid import evaluation, trainer  # noqa: E402

__all__ = ["evaluation", "trainer"]
