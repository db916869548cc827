"""What TRL and transformers make necessary: each piece with its reason, and the release that ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open


def load_renamed_weights(model: Any, folder: Path) -> bool:
    """Load a checkpoint into a model whose weights have other names, or another form, on disk than in memory.

    Those of vision towers and of experts do. transformers' Trainer loads what has the names in memory, warns, and goes
    on with what the model had before: a run that is resumed would begin anew.

    Returns:
        Whether the checkpoint is such a one; nothing is loaded otherwise.
    """
    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    if names <= model.state_dict().keys():
        return False
    saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())
    return True
