"""What a teacher said, on disk: shards of rows that are found by their content, beside a manifest that is checked.

    DIR/manifest.json          what was asked of whom, and, once all rows are there, the list of shards
    DIR/head.safetensors       the teacher's output head (formats of hidden states)
    DIR/tokenizer/             the teacher's tokenizer
    DIR/shards/NAME.safetensors

A row is the trained tokens of one sequence. Its key is a digest of its token ids and of which of them are trained, so
that batches, order, packing, epochs and subsets do not matter. A shard holds the tensors of the format for its tokens,
and for its rows ``keys``, ``stops`` (where each row ends) and ``checksums`` (CRC-32 of each row's bytes). NAME is a
digest of the file's header and of these three: so every byte is covered, and a row is verified when it is read without
reading the rest. A shard appears under its name when all of it is on disk, or not at all. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taid.fused import Head
from taid.run_folder import write_atomically
from taid.top_k import TopK

_LAYOUT = 1  # of files and keys
_MANIFEST, _HEAD, _SHARDS = "manifest.json", "head.safetensors", "shards"
_INDEX = ("keys", "stops", "checksums")
_KEY_BYTES = 16
_REPAIR = "`taid cache --repair` with the same recipe computes only that anew"


# --- rows -------------------------------------------------------------------------------------------------------------


class Sequence(NamedTuple):
    """A sequence within a batch: where it lies, its key, and how many of its tokens are trained."""

    row: int
    start: int
    stop: int
    key: bytes
    trained: int


def shifted(labels: Tensor) -> Tensor:
    """Of the labels of a batch, ``[B, T]``, what each position has to predict; the last predicts nothing."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def sequences(inputs: dict[str, Any], labels: Tensor) -> Iterator[Sequence]:
    """The sequences of a batch, in the order of its trained tokens.

    Args:
        inputs: ``input_ids`` ``[B, T]`` with an ``attention_mask``, or with ``position_ids`` that begin anew at 0 where
            several sequences lie in one row (packed, padding-free).
        labels: ``[B, T]``: the token that each position has to predict, -100 where it is not trained.
    """
    ids, trained = inputs["input_ids"].cpu().numpy(), (labels != -100).cpu().numpy()
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"].cpu().numpy()
        bounds = [
            (row, int(seen[0]), int(seen[-1]) + 1) for row, m in enumerate(mask) if len(seen := np.flatnonzero(m))
        ]
    else:
        bounds = []
        for row, positions in enumerate(inputs["position_ids"].cpu().numpy()):
            starts = np.flatnonzero(positions == 0).tolist()
            bounds += [(row, *pair) for pair in zip(starts, [*starts[1:], len(positions)], strict=True)]
    for row, start, stop in bounds:
        of_ids, of_trained = ids[row, start:stop].astype("<i8"), trained[row, start:stop]
        content = of_ids.tobytes() + np.packbits(of_trained).tobytes()
        key = hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()
        yield Sequence(row, start, stop, key, int(of_trained.sum()))


# --- formats ----------------------------------------------------------------------------------------------------------


def encoded(format_: str, signal: Tensor | TopK, vocabulary_size: int) -> dict[str, Tensor]:
    """The tensors of a format for some tokens, on the CPU: final hidden states ``[N, E]``, or their top k."""
    if isinstance(signal, TopK):
        top = signal.log_probs[:, :1]
        tensors = {
            # Relative to the likeliest, because half precision is exact for what is near 0.
            "log_probs": (signal.log_probs - top).to(torch.float16),
            "ids": signal.ids.to(_id_dtype(vocabulary_size)),
            "of_token": torch.stack([top[:, 0], signal.log_rest, signal.label_log_probs], -1).float(),
        }
    elif format_ == "hidden_int8":
        scale = signal.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        tensors = {"hidden": (signal.float() / scale).round().to(torch.int8), "scale": scale}
    else:
        tensors = {"hidden": signal}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _id_dtype(vocabulary_size: int) -> torch.dtype:
    return torch.uint16 if vocabulary_size <= 2**16 else torch.int32


def bytes_per_token(format_: str, *, hidden_size: int, dtype: torch.dtype, k: int, vocabulary_size: int) -> int:
    """What a trained token takes on disk."""
    of_format = {
        "hidden": hidden_size * dtype.itemsize,
        "hidden_int8": hidden_size + 4,
        "top_k": k * (2 + _id_dtype(vocabulary_size).itemsize) + 3 * 4,
    }
    return of_format[format_]


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Adds rows to a cache, a shard at a time.

    Args:
        folder: of the cache.
        identity: of its manifest; each shard carries it, so that it is refused in another cache.
        shard_bytes: how large a shard grows before it is written.
        seconds: how much work a kill may cost at the most: a shard is written after so long, whatever its size.
    """

    def __init__(self, folder: Path, identity: str, shard_bytes: int = 2**28, seconds: float = 120.0) -> None:
        self.folder, self.identity = folder / _SHARDS, identity
        self.shard_bytes, self.seconds = shard_bytes, seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[bytes, dict[str, Tensor]]] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, key: bytes, tensors: dict[str, Tensor]) -> None:
        """Keep a row; it is on disk after the next :meth:`flush`."""
        self._rows.append((key, tensors))
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was kept as one shard.

        Raises:
            OSError: the disk is full; nothing half-written is left.
        """
        if not self._rows:
            return
        keys, rows = zip(*self._rows, strict=True)
        lengths = [len(next(iter(row.values()))) for row in rows]
        index = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, _KEY_BYTES),
            "stops": torch.tensor(lengths).cumsum(0),
            "checksums": torch.tensor([_checksum(row) for row in rows]),
        }
        data = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        partial = self.folder / f"{os.getpid()}.partial"
        with _disk_errors(self.folder.parent, partial):
            save_file(index | data, partial, {"cache": self.identity})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.folder / f"{_shard_name(partial, index)}.safetensors")
        self._rows, self._bytes, self._since = [], 0, time.monotonic()


@contextlib.contextmanager
def _disk_errors(folder: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise OSError(
            f"{'no space left for' if full else 'cannot write'} the teacher cache in {folder}"
            f"{'' if full else f' ({error})'}. Whole shards are kept: make room and run the same command again; it "
            "continues there"
        ) from error


def _checksum(tensors: dict[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(_bytes(tensors[name]), total)
    return total


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()


def _shard_name(path: Path, index: dict[str, Tensor]) -> str:
    with path.open("rb") as file:
        length = file.read(8)
        digest = hashlib.sha256(length + file.read(struct.unpack("<Q", length)[0]))
    for name in _INDEX:
        digest.update(_bytes(index[name]))
    return digest.hexdigest()[:24]


# --- reading ----------------------------------------------------------------------------------------------------------


class Cache:
    """A cache that is open for reading.

    Args:
        folder: of the cache.

    Raises:
        ValueError: there is no cache, or a shard is missing, truncated or damaged; names it and the remedy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if not (folder / "tokenizer").is_dir():
            raise ValueError(
                f"teacher cache: {folder / 'tokenizer'} is missing: `taid cache` with its recipe restores it"
            )
        self._shards: list[tuple[Path, Any, Tensor, Tensor]] = []  # path, open file, starts and stops, checksums
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in self.shard_paths():
            self._open(path)
        listed = self.manifest.get("shards") or []
        if missing := sorted(set(listed) - {path.stem for path, *_ in self._shards}):
            raise ValueError(
                f"teacher cache {folder}: {len(missing)} of its {len(listed)} shards are missing, the first is "
                f"{_SHARDS}/{missing[0]}.safetensors: put it back, or {_REPAIR}"
            )

    def shard_paths(self) -> list[Path]:
        """All shards that are there."""
        return sorted((self.folder / _SHARDS).glob("*.safetensors"))

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            index = {name: file.get_tensor(name) for name in _INDEX}
            whole, cache = _shard_name(path, index) == path.stem, (file.metadata() or {}).get("cache")
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"teacher cache: shard {path} is truncated or damaged ({error}); {_REPAIR}") from error
        if not whole:
            raise ValueError(f"teacher cache: the index of shard {path} is damaged; {_REPAIR}")
        if cache != identity(self.manifest):
            raise ValueError(f"teacher cache: shard {path} belongs to another cache: remove it; {_REPAIR}")
        stops = index["stops"]
        bounds = torch.stack([torch.cat([stops.new_zeros(1), stops[:-1]]), stops], -1)
        keys = index["keys"].numpy().tobytes()
        for row in range(len(stops)):
            self._places[keys[row * _KEY_BYTES : (row + 1) * _KEY_BYTES]] = len(self._shards), row
        self._shards.append((path, file, bounds, index["checksums"]))

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def format(self) -> str:
        """hidden, hidden_int8 or top_k."""
        return str(self.manifest["format"])

    @property
    def kind(self) -> str:
        """See :class:`taid.teacher.Teacher`."""
        of_format = {"hidden": "exact", "hidden_int8": "hidden_int8", "top_k": f"top_k {self.manifest['k']}"}
        return of_format[self.format]

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.manifest["dtype"].removeprefix("torch."))  # type: ignore[no-any-return]

    def head(self) -> Head | None:
        """The teacher's output head, where hidden states need one.

        Raises:
            ValueError: the file is missing or damaged.
        """
        if self.format == "top_k":
            return None
        path, given = self.folder / _HEAD, self.manifest["head"]
        try:
            damaged = file_digest(path) != self.manifest["head_digest"]
            tensors = {} if damaged else load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"teacher cache: {path} cannot be read ({error}); {_REPAIR}") from error
        if damaged:
            raise ValueError(f"teacher cache: {path} is damaged; {_REPAIR}")
        return Head(tensors["weight"], tensors.get("bias"), given["scale"], given["softcap"])

    def read(self, key: bytes) -> dict[str, Tensor]:
        """The tensors of one row, verified.

        Raises:
            ValueError: the row is not there, or its bytes are not those that were written.
        """
        if key not in self._places:
            raise ValueError(
                f"teacher cache {self.folder} lacks a row of this run: `taid cache` with its recipe adds it"
            )
        number, row = self._places[key]
        path, file, bounds, checksums = self._shards[number]
        start, stop = bounds[row].tolist()
        tensors = {name: file.get_slice(name)[start:stop] for name in file.keys() if name not in _INDEX}  # noqa: SIM118
        if _checksum(tensors) != int(checksums[row]):
            raise ValueError(f"teacher cache: row {row} of shard {path} is damaged; {_REPAIR}")
        return tensors

    def decoded(self, records: list[dict[str, Tensor]], device: torch.device) -> Tensor | TopK:
        """Hidden states ``[N, E]`` or the top k of all tokens of some rows."""
        if not records:
            empty = torch.empty(0, dtype=torch.long, device=device)
            if self.format == "top_k":
                return TopK(empty.view(0, self.manifest["k"]), empty.view(0, self.manifest["k"]).float(),
                            empty.float(), empty.float())  # fmt: skip
            return torch.empty(0, self.manifest["hidden_size"], dtype=self._dtype, device=device)
        tensors = {name: torch.cat([r[name] for r in records]).to(device, non_blocking=True) for name in records[0]}
        if self.format == "top_k":
            top, rest, label = tensors["of_token"].unbind(-1)
            return TopK(tensors["ids"].long(), tensors["log_probs"].float() + top[:, None], rest, label)
        if self.format == "hidden_int8":
            return (tensors["hidden"].float() * tensors["scale"]).to(self._dtype)
        return tensors["hidden"]


def is_whole(path: Path, of_cache: str) -> bool:
    """Read all of a shard; whether each byte is what was written, for this cache."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("cache") != of_cache:
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        index = {name: tensors.pop(name) for name in _INDEX}
        if _shard_name(path, index) != path.stem:
            return False
    except (OSError, SafetensorError, KeyError):
        return False
    stops = index["stops"].tolist()
    bounds = zip([0, *stops], stops, index["checksums"].tolist(), strict=False)
    return all(_checksum({n: t[start:stop] for n, t in tensors.items()}) == sum_ for start, stop, sum_ in bounds)


# --- the manifest -----------------------------------------------------------------------------------------------------

# What a field is called in messages, and what to do where it differs.
_FIELDS = {
    "layout": ("layout of the files", "capture it again with this version of taid"),
    "format": ("format", "leave teacher_cache_format away, or capture another cache in another folder"),
    "k": ("k", "leave teacher_cache_top_k away, or capture another cache in another folder"),
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
    "teacher_tokenizer": ("tokenizer of the teacher", _REPAIR),
    "dtype": ("dtype of the hidden states", "set teacher_model_init_kwargs' dtype as it was, or capture elsewhere"),
    "hidden_size": ("width of the hidden states", "name the teacher that was captured"),
    "tokenizer": ("tokenizer of the student", "use the student's tokenizer of the capture, or capture again elsewhere"),
    "chat_template": ("chat template", "use the chat template of the capture, or capture again in another folder"),
    "vocabulary": ("ids that both models share", "use the pair of the capture, or format hidden"),
    "head": ("output head of the teacher", "name the teacher that was captured, or capture this one elsewhere"),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache; raises a ValueError where there is none or it is damaged."""
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(manifest, dict) and manifest.pop("digest", None) == _digest(manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is no teacher cache: it has no {_MANIFEST}; `taid cache` makes one") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher cache: {path} cannot be read ({error}); {_REPAIR}") from error
    if not whole:
        raise ValueError(f"teacher cache: {path} is not what was written; {_REPAIR}")
    check_manifest(manifest, {"layout": _LAYOUT}, folder)
    return dict(manifest)


def identity(manifest: dict[str, Any]) -> str:
    """Of whom and what a cache is: the same whenever it is captured, so that shards outlive a lost manifest."""
    return _digest({name: manifest.get(name) for name in _FIELDS if name != "teacher"})


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def check_manifest(manifest: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError that names the first field in which a cache differs from what is expected of it.

    What is None in `expected` is not known and not compared.
    """
    for name, value in expected.items():
        if value is not None and manifest.get(name) != value:
            words, remedy = _FIELDS[name]
            raise ValueError(
                f"teacher cache {folder} is of another run: {words} was {manifest.get(name)!r} at its capture and is "
                f"{value!r} now. Remedy: {remedy}."
            )


def start(folder: Path, manifest: dict[str, Any], head: Head | None, *, repair: bool = False) -> list[Path]:
    """Begin a cache, or go on with one that was begun with the same manifest; returns what was damaged and is gone.

    Args:
        folder: of the cache.
        manifest: what was asked of whom.
        head: the teacher's output head, where the format needs one.
        repair: read all that is there, delete shards that are not what was written, and make a lost manifest anew.

    Raises:
        ValueError: the folder holds a cache of another run, or other files.
    """
    head_file, shards = folder / _HEAD, folder / _SHARDS
    of_head = None if head is None else {"scale": head.scale, "softcap": head.softcap, "rows": len(head.weight)}
    manifest = manifest | {"layout": _LAYOUT, "head": of_head}
    try:
        found = read_manifest(folder)
    except ValueError:
        others = [p for p in (folder.iterdir() if folder.is_dir() else ()) if not _is_ours(p)]
        if others:
            raise ValueError(f"teacher_cache {folder} holds files that are no teacher cache: choose another") from None
        if (folder / _MANIFEST).exists() and not repair:
            raise
        found = {}
    else:
        expected = {name: manifest.get(name) for name in _FIELDS}
        if expected["teacher_weights"] is not None:
            del expected["teacher"]  # the same teacher in another place
        check_manifest(found, expected, folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards.mkdir(exist_ok=True)
    for partial in [*folder.glob("*.partial"), *shards.glob("*.partial")]:  # of a capture that was killed
        partial.unlink()
    damaged = []
    if repair:
        damaged = [path for path in sorted(shards.glob("*.safetensors")) if not is_whole(path, identity(manifest))]
        found["shards"] = None
        for path in damaged:
            path.unlink()
    digest = found.get("head_digest")
    if head is not None and (digest is None or not head_file.exists() or file_digest(head_file) != digest):
        partial = folder / f"{_HEAD}.partial"
        tensors = {"weight": head.weight, "bias": head.bias}
        with _disk_errors(folder, partial):
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items() if t is not None}, partial)
            digest = file_digest(partial)
            os.replace(partial, head_file)
    write_manifest(folder, {"shards": found.get("shards"), **manifest, "head_digest": digest})
    return damaged


def _is_ours(path: Path) -> bool:
    return path.name in (_HEAD, _MANIFEST, _SHARDS, "tokenizer") or path.suffix == ".partial"


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest, whole or not at all."""
    write_atomically(folder / _MANIFEST, json.dumps(manifest | {"digest": _digest(manifest)}, indent=1) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
