"""Read the options of TRL and transformers from their installed source files, without importing either.

Importing them takes seconds, most of all because of torch. Names, types, choices, defaults and help stand in the source
as plain literals, and are right for whichever version is installed. What is found here serves help and the first check
of a command line; :mod:`taid.config.parsing` then reads the same command line with the real classes.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional, Union

# A class of a package, its file, and the class that it has to inherit from.
_TRAINING = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_MODEL = (("trl", "trainer/model_config.py", "ModelConfig"),)
_TYPES = {
    name: kind
    for kind in (bool, dict, float, int, list, str, tuple)
    for name in (kind.__name__, kind.__name__.capitalize())
} | {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union}


@dataclass(frozen=True)
class Installed:
    """The classes that a command line is read with.

    Attributes:
        parser: transformers' ``HfArgumentParser``.
        sft: TRL's ``SFTConfig``, or a dataclass with the same fields.
        model: TRL's ``ModelConfig``, or a dataclass with the same fields.
    """

    parser: type[argparse.ArgumentParser]
    sft: type
    model: type


def read_installed() -> Installed | None:
    """Return dataclasses with the fields of the installed versions; None where their source cannot be read so."""
    try:
        parser = _load_module("transformers", "hf_argparser.py").HfArgumentParser
        return Installed(parser, _read_chain(_TRAINING), _read_chain(_MODEL))
    except Exception:  # whatever an unforeseen version makes of it: the real classes are slower, and always right
        return None


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(package)
    return Path(found.origin).parent


def _load_module(package: str, file: str) -> Any:
    """Execute one file of a package that imports none of its siblings."""
    found = importlib.util.spec_from_file_location(f"taid_reads_{Path(file).stem}", _folder(package) / file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _read_chain(classes: tuple[tuple[str, str, str], ...]) -> type:
    made: type = object
    for package, file, name in classes:
        made = _read_class(_folder(package) / file, name, made)
    return made


def _read_class(path: Path, name: str, base: type) -> type:
    """Return a dataclass with the fields of class `name` in a file, on top of `base`."""
    source = _Source(path)
    defined = source.classes[name]
    if [ast.unparse(parent) for parent in defined.bases] != ([] if base is object else [base.__name__]):
        raise ValueError(f"{name} inherits from something else")
    fields = [
        (node.target.id, source.type_of(node.annotation), source.field_of(node.value, defined))
        for node in defined.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    return make_dataclass(name, fields, bases=() if base is object else (base,))


class _Source:
    """A source file, whose literals are evaluated and whose code is not run."""

    def __init__(self, path: Path) -> None:
        self.path, self.tree = path, ast.parse(path.read_text(encoding="utf-8"))
        self.classes = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    def type_of(self, annotation: ast.expr) -> Any:
        names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
        known = _TYPES | {name: self._class(name) for name in names - _TYPES.keys()}
        return eval(compile(ast.Expression(annotation), str(self.path), "eval"), {"__builtins__": {}}, known)

    def field_of(self, value: ast.expr | None, defined: ast.ClassDef) -> Any:
        if not isinstance(value, ast.Call):
            return field() if value is None else field(default=self._literal(value, defined))
        given = {str(keyword.arg): keyword.value for keyword in value.keywords}
        known: dict[str, Any] = {"metadata": self._metadata(given.pop("metadata", None))}
        if (factory := given.pop("default_factory", None)) is not None:
            known["default_factory"] = self.type_of(factory)
        return field(**known, **{name: self._literal(node, defined) for name, node in given.items()})

    def _metadata(self, node: ast.expr | None) -> dict[str, Any]:
        """Return the literal entries of a field's metadata; choices that are computed are left to the real parser."""
        found = {}
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            try:
                found[ast.literal_eval(key)] = ast.literal_eval(value)  # type: ignore[arg-type]
            except ValueError:
                if ast.literal_eval(key) == "help":  # type: ignore[arg-type]
                    raise
        return found

    def _literal(self, node: ast.expr, defined: ast.ClassDef) -> Any:
        if isinstance(node, ast.Name):  # assigned in the class, where newer versions of torch have the last word
            named = [
                assigned.value
                for assigned in ast.walk(defined)
                if isinstance(assigned, ast.Assign) and ast.unparse(assigned.targets[0]) == node.id
            ]
            node = named[-1]
        return ast.literal_eval(node)

    def _class(self, name: str) -> type:
        """Return an enumeration that the file defines or imports; any other class as one that takes every value."""
        source = self
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and node.level == 1 and name in [alias.name for alias in node.names]:
                path = self.path.parent / f"{str(node.module).replace('.', '/')}.py"
                source = _Source(path) if path.is_file() else self
        defined = source.classes.get(name)
        if defined is None or not any("Enum" in ast.unparse(base) for base in defined.bases):
            return type(name, (), {"__init__": lambda self, *_: None})
        members = [node for node in defined.body if isinstance(node, ast.Assign)]
        kind: Any = Enum
        made: type = kind(name, [(ast.unparse(m.targets[0]), ast.literal_eval(m.value)) for m in members])
        return made
