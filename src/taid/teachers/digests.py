"""Compute digests of everything that a cache of teacher answers depends on."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

_BLOCK = 2**16
_BLOCKS = 4096  # of a weight file that are read: all of a file up to 256 MB


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of all tokens with their ids, and of how text is split."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    # Padding and truncation are a tokenizer's state of the moment.
    if backend is not None:
        content = json.dumps({k: v for k, v in json.loads(content).items() if k not in ("padding", "truncation")})
    return _digest(content)


def text_digest(text: str | None) -> str | None:
    """Return the digest of a chat template; None if there is none."""
    return None if text is None else _digest(text)


def ids_digest(ids: tuple[int, ...]) -> str:
    """Return the number and digest of the ids that two models share."""
    return f"{len(ids)} ids, {_digest(','.join(map(str, ids)))}"


def model_digests(name_or_path: str | None, revision: str | None) -> dict[str, str | None]:
    """Return digests of a model's configuration and weights; None if they are not on this machine.

    A file of more than 256 MB is sampled: its header, its size, and 4,096 evenly spread blocks of 64 KB.
    Another training run changes nearly every weight, and so a 144 GB teacher is identified in seconds.
    """
    folder = _folder(name_or_path, revision)
    weights = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if folder is None or not weights:
        return {"teacher_config": None, "teacher_weights": None}
    digest, path = hashlib.sha256(), folder / "config.json"
    if not path.exists() and (folder / "adapter_config.json").exists():
        path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for path in weights:
            _add_file(digest, path)
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"teacher file {path} cannot be read ({error}): copy the teacher's folder again") from error
    # What transformers notes of itself and of where the folder lay.
    config = {name: value for name, value in config.items() if name not in ("transformers_version", "_name_or_path")}
    if "base_model_name_or_path" in config:  # an adapter is nothing without its base
        base = model_digests(config.pop("base_model_name_or_path"), config.get("revision"))
        digest.update(str(base["teacher_weights"]).encode())
        config["base"] = base["teacher_config"]
    return {
        "teacher_config": _digest(json.dumps(config, sort_keys=True)),
        "teacher_weights": digest.hexdigest()[:32],
    }


def _folder(name_or_path: str | None, revision: str | None) -> Path | None:
    if name_or_path is None:
        return None
    folder = Path(os.path.expanduser(name_or_path))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _add_file(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(8)
        length = struct.unpack("<Q", header)[0]
        if length > size:
            raise ValueError("it is no safetensors file; is it a pointer of Git LFS?")
        header += file.read(length)
        digest.update(size.to_bytes(8, "little") + header)
        blocks = -(-(size - len(header)) // _BLOCK)
        for number in range(min(blocks, _BLOCKS)):
            file.seek(len(header) + _BLOCK * (number * blocks // min(blocks, _BLOCKS)))
            digest.update(file.read(_BLOCK))


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:32]
