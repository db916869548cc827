"""Find the files that a data set name means. It needs no library, so that a missing file is reported at once."""

from __future__ import annotations

import glob
from pathlib import Path

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def file_type(path: Path) -> str:
    """Return the suffix without compression, ``.jsonl`` for ``rows.jsonl.zst``; "" if the type is not supported."""
    is_compressed = path.suffix in COMPRESSIONS
    suffix = path.with_suffix("").suffix if is_compressed else path.suffix
    return suffix if suffix in BUILDERS and not (is_compressed and suffix == ".parquet") else ""


def local_files(name: str) -> list[Path]:
    """Return the files that `name` means; none if it is a folder or a Hub name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the files are empty, of several types, or of a type that is not supported.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return []
    is_glob = glob.has_magic(name) and not path.is_file()
    if not file_type(path) and not is_glob:
        if path.is_file():
            raise ValueError(f"{name}: files of type {path.suffix!r} are not read; use {', '.join(BUILDERS)}")
        return []
    files = sorted(Path(match) for match in glob.glob(str(path), recursive=True)) if is_glob else [path]
    if not files:
        raise FileNotFoundError(f"no file matches {name}")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"data file {file} does not exist")
        if not file_type(file) or file_type(file) != file_type(files[0]):
            raise ValueError(f"{name} must match files of one type among {', '.join(BUILDERS)}; it matches {file}")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{name} is empty")
    return files
