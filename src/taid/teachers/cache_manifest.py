"""Read and write the manifest of a cache, and compare it with what a run asks for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from taid.artifacts.run_folder import write_atomically

LAYOUT = 2  # of files and keys
FILE = "manifest.json"
REPAIR = "`taid cache --repair` with the same recipe computes only that anew"

# What a field is called in messages, and what to do where it differs.
FIELDS = {
    "layout": ("layout of the files", "capture it again with this version of taid"),
    "format": ("format", "leave teacher_cache_format away, or capture another cache in another folder"),
    "k": ("k", "leave teacher_top_k away, or capture another cache in another folder"),
    "draws": ("draws", "leave teacher_cache_samples away, or capture another cache in another folder"),
    "server_model": ("model of the server", "name the one that was captured, or capture this one in another folder"),
    "teacher": ("teacher", "name the teacher that was captured, or capture this one in another folder"),
    "teacher_revision": ("revision of the teacher", "set teacher_model_revision to it, or capture this one elsewhere"),
    "teacher_config": (
        "configuration of the teacher",
        "restore its config.json, or capture this one in another folder",
    ),
    "teacher_weights": ("weights of the teacher", "restore them, or capture this teacher in another folder"),
    "teacher_options": (
        "way in which the teacher was run",
        "set bf16, fp16 and teacher_model_init_kwargs as at the capture, or capture it this way in another folder",
    ),
    "teacher_tokenizer": ("tokenizer of the teacher", REPAIR),
    "dtype": ("dtype of the hidden states", "set teacher_model_init_kwargs' dtype as it was, or capture elsewhere"),
    "hidden_size": ("width of the hidden states", "name the teacher that was captured"),
    "tokenizer": ("tokenizer of the student", "use the student's tokenizer of the capture, or capture again elsewhere"),
    "chat_template": ("chat template", "use the chat template of the capture, or capture again in another folder"),
    "vocabulary": ("ids that both models share", "use the pair of the capture, or format hidden"),
    "head": ("output head of the teacher", "name the teacher that was captured, or capture this one elsewhere"),
}


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a cache; raise a ValueError if it is missing or damaged."""
    path = folder / FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(manifest, dict) and manifest.pop("digest", None) == _digest(manifest)
    except (FileNotFoundError, NotADirectoryError):
        if (folder / "shards").is_dir():
            raise ValueError(
                f"teacher cache {folder} has lost its {FILE}; `taid cache` with its recipe makes it"
            ) from None
        raise ValueError(f"{folder} is no teacher cache: it has no {FILE}; `taid cache` makes one") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher cache: {path} cannot be read ({error}); {REPAIR}") from error
    if not whole:
        raise ValueError(f"teacher cache: {path} is not what was written; {REPAIR}")
    check(manifest, {"layout": LAYOUT}, folder)
    return dict(manifest)


def identity(manifest: dict[str, Any]) -> str:
    """Return a digest of teacher and request. It does not depend on the capture, so shards outlive a lost manifest."""
    return _digest({name: manifest.get(name) for name in FIELDS if name != "teacher"})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def check(manifest: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError that names the first field in which a cache differs from `expected`.

    Fields that are None in `expected` are unknown and not compared.
    """
    for name, value in expected.items():
        if value is not None and manifest.get(name) != value:
            words, remedy = FIELDS[name]
            raise ValueError(
                f"teacher cache {folder} is of another run: {words} was {manifest.get(name)!r} at its capture and is "
                f"{value!r} now. Remedy: {remedy}."
            )


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest atomically."""
    write_atomically(folder / FILE, json.dumps(manifest | {"digest": _digest(manifest)}, indent=1) + "\n")
