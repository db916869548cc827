"""Store a teacher's answers on disk: shards of rows with content keys, and a manifest that is checked.

    DIR/manifest.json          what was asked of which teacher, and the list of shards once all rows are there
    DIR/head.safetensors       the teacher's output head (formats of hidden states)
    DIR/tokenizer/             the teacher's tokenizer
    DIR/shards/NAME.safetensors

A row is the trained tokens of one sequence. Its key is a digest of its token ids and of which of them are trained. So
batches, order, packing, epochs and subsets do not matter.

A shard holds the tensors of the format for its tokens. For its rows it holds ``keys``, ``stops`` (the end of each in
each tensor, in the order of their names) and ``checksums`` (CRC-32 of each row's bytes). NAME is a digest of the file's
header and of these three. So every byte is covered, and a row is verified without reading the others.

A shard appears under its name only when all of it is on disk. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from taid.losses.fused import Head
from taid.teachers import cache_manifest as manifests
from taid.teachers.cache_format import Format
from taid.teachers.cache_manifest import REPAIR, identity
from taid.teachers.sequences import KEY_BYTES

_HEAD, _SHARDS = "head.safetensors", "shards"
_INDEX = ("keys", "stops", "checksums")


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Add rows to a cache, a shard at a time.

    Args:
        folder: the folder of the cache.
        identity: the identity of its manifest; each shard carries it, so that another cache refuses it.
        shard_bytes: the size at which a shard is written.
        seconds: the time after which a shard is written, whatever its size: a kill costs no more work than this.
    """

    def __init__(self, folder: Path, identity: str, shard_bytes: int = 2**28, seconds: float = 120.0) -> None:
        self.folder, self.identity = folder / _SHARDS, identity
        self.shard_bytes, self.seconds = shard_bytes, seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[bytes, dict[str, Tensor]]] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, key: bytes, tensors: dict[str, Tensor]) -> None:
        """Add a row; it is on disk after the next :meth:`flush`."""
        self._rows.append((key, tensors))
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes >= self.shard_bytes or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write the added rows as one shard.

        Raises:
            OSError: the disk is full; no partial file is left.
        """
        if not self._rows:
            return
        keys, rows = zip(*self._rows, strict=True)
        names = sorted(rows[0])
        lengths = torch.tensor([[len(row[name]) for name in names] for row in rows])
        index = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES),
            "stops": lengths.cumsum(0),
            "checksums": torch.tensor([_checksum(row) for row in rows]),
        }
        data = {name: torch.cat([row[name] for row in rows]) for name in names}
        partial = self.folder / f"{uuid.uuid4().hex}.partial"  # machines may share a disk, and process numbers
        with disk_errors(self.folder.parent, partial):
            save_file(index | data, partial, {"cache": self.identity})
            partial.chmod(self.folder.stat().st_mode & 0o666)  # safetensors lets nobody else read it
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.folder / f"{_shard_name(partial, index)}.safetensors")
        self._rows, self._bytes, self._since = [], 0, time.monotonic()


@contextlib.contextmanager
def disk_errors(folder: Path, partial: Path | None = None) -> Iterator[None]:
    """Turn errors of writing to a cache into messages with a remedy, and remove the partial file."""
    try:
        yield
    except Exception as error:  # safetensors and tokenizers raise errors of their own
        if partial is not None:
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
        folder: the folder of the cache.

    Raises:
        ValueError: there is no cache, or a shard is missing, truncated or damaged; names it and the remedy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, manifests.read(folder)
        self.format = Format.from_manifest(self.manifest)
        if not (folder / "tokenizer").is_dir():
            raise ValueError(
                f"teacher cache: {folder / 'tokenizer'} is missing: `taid cache` with its recipe restores it"
            )
        # Their paths, tensors, bounds and checksums. The tensors are views of the files, which are read as rows are;
        # they are made once, because safetensors (0.8.0) loses a Python object each time that it makes one.
        self._shards: list[tuple[Path, dict[str, Tensor], Tensor, Tensor]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in self.shard_paths():
            self._open(path)
        listed = self.manifest.get("shards") or []
        if missing := sorted(set(listed) - {path.stem for path, *_ in self._shards}):
            raise ValueError(
                f"teacher cache {folder}: {len(missing)} of its {len(listed)} shards are missing, the first is "
                f"{_SHARDS}/{missing[0]}.safetensors: put it back, or {REPAIR}"
            )

    def shard_paths(self) -> list[Path]:
        """Return the paths of all shards that are there."""
        return sorted((self.folder / _SHARDS).glob("*.safetensors"))

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            index = {name: tensors.pop(name) for name in _INDEX}
            whole, cache = _shard_name(path, index) == path.stem, (file.metadata() or {}).get("cache")
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"teacher cache: shard {path} is truncated or damaged ({error}); {REPAIR}") from error
        if not whole:
            raise ValueError(f"teacher cache: the index of shard {path} is damaged; {REPAIR}")
        if cache != identity(self.manifest):
            raise ValueError(f"teacher cache: shard {path} belongs to another cache: remove it; {REPAIR}")
        keys = index["keys"].numpy().tobytes()
        for row in range(len(index["keys"])):
            self._places[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = len(self._shards), row
        self._shards.append((path, tensors, _bounds(index["stops"]), index["checksums"]))

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._places)

    def head(self) -> Head | None:
        """Return the teacher's output head; None if the format stores no hidden states.

        Raises:
            ValueError: the file is missing or damaged.
        """
        if not self.format.needs_head:
            return None
        path, given = self.folder / _HEAD, self.manifest["head"]
        try:
            damaged = file_digest(path) != self.manifest["head_digest"]
            tensors = {} if damaged else load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"teacher cache: {path} cannot be read ({error}); {REPAIR}") from error
        if damaged:
            raise ValueError(f"teacher cache: {path} is damaged; {REPAIR}")
        return Head(tensors["weight"], tensors.get("bias"), given["scale"], given["softcap"])

    def read(self, key: bytes) -> dict[str, Tensor]:
        """Read and verify the tensors of one row.

        Raises:
            ValueError: the row is not there, or its bytes are damaged.
        """
        if key not in self._places:
            raise ValueError(
                f"teacher cache {self.folder} lacks a row of this run: `taid cache` with its recipe adds it"
            )
        number, row = self._places[key]
        path, of_shard, bounds, checksums = self._shards[number]
        places = zip(of_shard, *bounds[:, row].tolist(), strict=True)
        tensors = {name: of_shard[name][start:stop] for name, start, stop in places}
        if _checksum(tensors) != int(checksums[row]):
            raise ValueError(f"teacher cache: row {row} of shard {path} is damaged; {REPAIR}")
        return tensors


def _bounds(stops: Tensor) -> Tensor:
    """Return where each row starts and stops in each tensor, ``[2, rows, tensors]``."""
    return torch.stack([torch.cat([stops.new_zeros(1, stops.shape[1]), stops[:-1]]), stops])


def is_whole(path: Path, of_cache: str | None) -> bool:
    """Read all of a shard; return whether it belongs to this cache and every byte is as it was written."""
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
    starts, stops = _bounds(index["stops"]).tolist()
    rows = zip(starts, stops, index["checksums"].tolist(), strict=True)
    return all(
        _checksum({n: tensors[n][a:b] for n, a, b in zip(sorted(tensors), *bounds, strict=True)}) == checksum
        for *bounds, checksum in rows
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def start(folder: Path, manifest: dict[str, Any], head: Head | None, *, repair: bool = False) -> list[Path]:
    """Begin a cache, or continue one with the same manifest; return the damaged files that were removed.

    Args:
        folder: the folder of the cache.
        manifest: what is asked of which teacher.
        head: the teacher's output head, if the format needs one.
        repair: read all shards, delete damaged ones, and write a lost manifest again.

    Raises:
        ValueError: the folder holds a cache of another run, or other files.
    """
    head_file, shards = folder / _HEAD, folder / _SHARDS
    of_head = None if head is None else {"scale": head.scale, "softcap": head.softcap, "rows": len(head.weight)}
    manifest = manifest | {"layout": manifests.LAYOUT, "head": of_head}
    try:
        found = manifests.read(folder)
    except ValueError:
        others = [p for p in (folder.iterdir() if folder.is_dir() else ()) if not _is_ours(p)]
        if others:
            raise ValueError(f"teacher_cache {folder} holds files that are no teacher cache: choose another") from None
        if (folder / manifests.FILE).exists() and not repair:
            raise
        found = {}
    else:
        expected = {name: manifest.get(name) for name in manifests.FIELDS}
        if expected["teacher_weights"] is not None:
            del expected["teacher"]  # the teacher may have moved
        manifests.check(found, expected, folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards.mkdir(exist_ok=True)
    _require_own_shards(shards, identity(manifest))
    partials = [path for path in shards.glob("*.partial") if len(path.stem) == 32]
    for partial in [folder / f"{name}.partial" for name in (_HEAD, manifests.FILE)] + partials:  # a capture was killed
        partial.unlink(missing_ok=True)
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
        with disk_errors(folder, partial):
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items() if t is not None}, partial)
            partial.chmod(folder.stat().st_mode & 0o666)
            digest = file_digest(partial)
            os.replace(partial, head_file)
    with disk_errors(folder):
        manifests.write(folder, {"shards": found.get("shards"), **manifest, "head_digest": digest})
    return damaged


def _require_own_shards(shards: Path, of_cache: str) -> None:
    """Raise a ValueError for a whole shard of another cache: it may have taken days to make."""
    for path in sorted(shards.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                theirs, names = (file.metadata() or {}).get("cache"), file.keys()
        except (OSError, SafetensorError):
            continue  # damaged
        if theirs != of_cache and (is_whole(path, theirs) or not set(_INDEX) <= set(names)):
            raise ValueError(
                f"teacher cache: {path} is whole and belongs to something else, of another teacher, precision or "
                "format: use its recipe, or choose another folder, or move it away"
            )


def _is_ours(path: Path) -> bool:
    folders = path.name in (_SHARDS, "tokenizer") and path.is_dir()
    return folders or path.name in (_HEAD, manifests.FILE) or path.suffix == ".partial"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
