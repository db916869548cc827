"""Real text that lies on every machine: the source of the running Python's standard library.

The demo distils on it and ``scripts/train_demo_models.py`` trains the demo's two models on it. Modules are split by
their top-level name, so that no part of a package is trained on while another part of it is held out, and a model
trained under one Python version never saw the held-out modules of another.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "held_out"]

# Not prose-like source: test data, code tables, vendored or machine-written files.
_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "ensurepip", "turtledemo"}
_EXCLUDED |= {"site-packages", "dist-packages", "__pycache__"}
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")


def split_of(top_level_name: str) -> Split:
    """Return the split of a module, from a hash of its name: 14/16 train, 1/16 validation, 1/16 held out."""
    bucket = hashlib.sha256(top_level_name.encode()).digest()[0] % 16
    return {9: "validation", 13: "held_out"}.get(bucket, "train")  # type: ignore[return-value]


def read(split: Split) -> list[str]:
    """Return the text of every module of `split`, one string a file, in the order of their paths.

    Raises:
        FileNotFoundError: this Python carries no standard library source (a frozen or stripped build).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _EXCLUDED.intersection(parts[:-1]) or parts[0].startswith(_EXCLUDED_PREFIXES):
            continue
        if split_of(parts[0].removesuffix(".py")) == split:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    if not texts:
        raise FileNotFoundError(
            f"no standard library source under {root}: this Python was built without it. "
            "Use a full CPython, or `taid train` with your own data."
        )
    return texts
