"""Small functions on option values: how they are shown, saved without secrets, and compared with known names."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

_Configuration = TypeVar("_Configuration")

# eos_token and pad_token are words of the vocabulary.
_SECRET = re.compile(r"(?!(eos|pad)_token$)((.*_)?token|.*(password|secret).*|api_key)", re.IGNORECASE)


def resolved(*configurations: Any) -> dict[str, Any]:
    """Return all values of a run as one flat mapping for config.yaml, without secrets and deprecated names."""
    values: dict[str, Any] = {}
    for configuration in configurations:
        values |= configuration.to_dict() if hasattr(configuration, "to_dict") else vars(configuration)
        for name in {"eos_token", "pad_token"} & vars(configuration).keys():
            values[name] = getattr(configuration, name)  # to_dict hides them
    values = {k: v for k, v in values.items() if not k.startswith("gradient_checkpointing")}
    plain: dict[str, Any] = json.loads(
        json.dumps(values, default=str),
        object_hook=lambda mapping: {k: v for k, v in mapping.items() if not _SECRET.fullmatch(k)},
    )
    return plain


def changed(configuration: _Configuration, **values: Any) -> _Configuration:
    """Return a copy with other values. Nothing is checked or derived anew, and the original stays as it is."""
    copied = copy.copy(configuration)
    for name, value in values.items():
        setattr(copied, name, value)
    return copied


def in_yaml(value: Any) -> str:
    """Return a value as a YAML file has it, for messages."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def is_mapping(value: Any) -> bool:
    """Return whether a value is a mapping, JSON text of one, or None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return False
    return value is None or isinstance(value, dict)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question whether the most similar known name was meant; "" if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def check_url(url: str, option: str, api_key: str) -> None:
    """Check the address of a server.

    Args:
        url: the address.
        option: the option that holds it, for messages.
        api_key: the environment variable that holds the server's key, for messages.

    Raises:
        ValueError: it is no address of a server, or it holds a secret.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # brackets that do not close, a port that is no number
        raise ValueError(f"{option} must be like http://localhost:8000") from None
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"{option} holds credentials, which would be saved with the run: put the key into the environment as "
            f"{api_key}"
        )
    if not usable or any(character in "#?" or character.isspace() for character in url):
        raise ValueError(f"{option} must be like http://localhost:8000, got {url!r}")
