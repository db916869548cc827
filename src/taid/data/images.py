"""Rows with images: find unreadable ones, decode them one batch at a time, and exchange images for a test."""

from __future__ import annotations

import functools
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, List
from PIL import Image as Pixels
from PIL import ImageOps

logger = logging.getLogger(__name__)

COLUMNS = ("images", "image")
PLACE = "taid_place"
"""Column with the place of a row, for messages."""

_ERRORS = (OSError, SyntaxError, ValueError, Pixels.DecompressionBombError, Pixels.DecompressionBombWarning)


def has_images(dataset: Any) -> bool:
    """Return whether the rows have a column of images."""
    return any(column in COLUMNS for column in getattr(dataset, "column_names", None) or ())


def with_paths(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield places and rows of JSON unchanged; raise a ValueError for images that are not paths."""
    for place, row in rows:
        image, images = (row.get("image"), row.get("images")) if isinstance(row, dict) else (None, None)
        if not isinstance(image, str | None):
            raise ValueError(f"{place}: `image` must be the path of one image, got {json.dumps(image):.80}")
        if images is not None and not (isinstance(images, list) and all(isinstance(path, str) for path in images)):
            raise ValueError(f"{place}: `images` must be a list of paths, got {json.dumps(images):.80}")
        yield place, row


def prepared_sets(train: Dataset, held_out: Any, *, skip: bool) -> tuple[Dataset, Any]:
    """Return training and held-out rows (one set, a dict of several, or None), each :func:`prepared`."""
    if isinstance(held_out, dict):
        found: Any = {name: prepared(rows, f"the {name} data set", skip=skip) for name, rows in held_out.items()}
    else:
        found = None if held_out is None else prepared(held_out, "the eval data set", skip=skip)
    return prepared(train, "the train data set", skip=skip), found


def prepared(
    dataset: Dataset, name: str, *, places: list[str] | None = None, folder: Path | None = None, skip: bool = False
) -> Dataset:
    """Give each row its place, and check that its image files can be opened.

    Only the headers of files are read. Images that are stored in the rows are decoded in training.

    Args:
        dataset: rows with ``image`` or ``images``: paths, or what datasets' ``Image`` feature holds; or with neither.
        name: the name of the data set, for the places.
        places: the place of each row; by default its number in `name`.
        folder: the folder that relative paths start from.
        skip: leave out rows whose images cannot be read, and log how many.

    Returns:
        The rows with undecoded images, so that a broken one can be named.

    Raises:
        ValueError: an image cannot be read; names the row, the file and the remedy.
    """
    if PLACE in dataset.column_names:
        return dataset
    places = places or [f"{name}, row {number}" for number in range(len(dataset))]
    if not has_images(dataset):
        return dataset.add_column(PLACE, places)
    columns = [column for column in COLUMNS if column in dataset.column_names]
    if "input_ids" in dataset.column_names:
        raise ValueError(f"{name}: rows of input_ids have no images: give messages, prompt and completion, or text")
    for other in {"tools", "chat_template_kwargs"} & set(dataset.column_names):
        raise ValueError(f"{name}: rows with images go without `{other}`, which would be ignored: remove the column")
    for column in columns:
        feature = dataset.features[column]
        inner = getattr(feature, "feature", feature)
        if (inner is feature) != (column == "image") and getattr(inner, "dtype", None) != "null":
            raise ValueError(f"{name}: `images` is a list of images and `image` is one; here `{column}` is {feature}")
        if getattr(inner, "dtype", None) == "string":
            absolute = functools.partial(_absolute_paths, column=column, folder=folder)
            dataset = dataset.map(absolute, keep_in_memory=True)
        raw = Image(decode=False)
        dataset = dataset.cast_column(column, raw if column == "image" else List(raw))
    return _readable(dataset.add_column(PLACE, places), columns, skip=skip)


def _absolute_paths(row: dict[str, Any], *, column: str, folder: Path | None) -> dict[str, Any]:
    return {column: _absolute(row[column], folder)}


def _absolute(value: Any, folder: Path | None) -> Any:
    if isinstance(value, list):
        return [_absolute(path, folder) for path in value]
    path = Path(value or "").expanduser()
    return value and str(path if path.is_absolute() or folder is None else folder / path)


def _readable(dataset: Dataset, columns: list[str], *, skip: bool) -> Dataset:
    errors: dict[int, ValueError] = {}
    for number, row in enumerate(dataset.select_columns([*columns, PLACE])):
        try:
            for image in images_in(row):
                if image.get("bytes") is None:
                    _open(image, row[PLACE])
        except ValueError as error:
            if not skip:
                raise
            errors[number] = error
    if errors:
        if len(errors) == len(dataset):
            raise next(iter(errors.values()))
        logger.warning(f"{len(errors)} of {len(dataset)} rows are left out; the first: {next(iter(errors.values()))}")
    return dataset.select([i for i in range(len(dataset)) if i not in errors]) if errors else dataset


def images_in(row: dict[str, Any]) -> list[Any]:
    """Return the images of a row; the list may be empty."""
    return [image for image in (*(row.get("images") or ()), row.get("image")) if image is not None]


def decoded(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with a list of RGB images under ``images``.

    Raises:
        ValueError: an image cannot be read, or is so large that it may be an attack; names row, file and remedy.
    """
    place = row.get(PLACE, "a row")
    images = [image if isinstance(image, Pixels.Image) else _open(image, place, load=True) for image in images_in(row)]
    rest = {column: value for column, value in row.items() if column not in COLUMNS}
    return rest | {"images": [_as_rgb(ImageOps.exif_transpose(image), place) for image in images]}


def _as_rgb(image: Pixels.Image, place: str) -> Pixels.Image:
    if image.mode == "F":
        raise ValueError(f"{place}: an image has floating-point values, whose range is not known: save it with 8 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    return image.convert("RGB")


def _open(image: Any, place: str, *, load: bool = False) -> Pixels.Image:
    content = image.get("bytes")
    try:
        with warnings.catch_warnings(), open(image["path"], "rb") if content is None else io.BytesIO(content) as file:
            warnings.simplefilter("error", Pixels.DecompressionBombWarning)
            opened = Pixels.open(file)
            if load:
                opened.load()
    except _ERRORS as error:
        name = f"image {image['path']}" if image.get("path") else "an image"
        raise ValueError(
            f"{place}: {name} cannot be read: {error}. Mend or remove the row, or leave such rows out with "
            "skip_bad_images: true"
        ) from error
    return opened


def exchanged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return decoded rows in which each image is replaced by one of another row, resized to the same size.

    The text and the number of image tokens stay the same. If all rows have the same image, its colours are inverted.
    """
    images = [(number, image) for number, row in enumerate(rows) for image in row["images"]]

    def others() -> Iterator[Pixels.Image]:
        for place, (number, image) in enumerate(images):
            following = [other for n, other in images[place + 1 :] + images[:place] if n != number]
            resized = (other.resize(image.size) for other in following)
            yield next((other for other in resized if other.tobytes() != image.tobytes()), ImageOps.invert(image))

    other = others()
    return [row | {"images": [next(other) for _ in row["images"]]} for row in rows]


def inverted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return decoded rows in which the colours of each image are inverted."""
    return [row | {"images": [ImageOps.invert(image) for image in row["images"]]} for row in rows]
