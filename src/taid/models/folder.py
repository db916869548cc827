"""Check a model's folder without loading torch."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(name_or_path: str, role: str) -> None:
    """Check a local model folder; transformers itself would search the Hub for a missing one."""
    folder = Path(os.path.expanduser(name_or_path))
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or os.sep != "/"
    if not folder.exists():
        if looks_local and "/" in name_or_path:
            raise ValueError(f"{role} folder {name_or_path!r} does not exist")
        return
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{role} folder {name_or_path!r} holds no config.json: it is not a folder written by save_pretrained"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(
            f"{role} folder {name_or_path!r} holds no *.safetensors file. Other formats are not loaded, because "
            "pickled weights can run code: convert with model.save_pretrained(folder)."
        )
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{role} weights {path} are truncated or damaged ({error}): copy the file again"
            ) from error
