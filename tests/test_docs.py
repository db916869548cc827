"""The documentation: what it says of files, options, names and recipes is what there is.

`python tests/test_docs.py` prints the tables of docs/reference.md, to be pasted after an option or a signature changed.
"""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml
from trl import SFTConfig

import taid
from taid import objectives
from taid.config import TAIDConfig, parse

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
REFERENCE = ROOT / "docs" / "reference.md"


def blocks(path: Path, marker: str, language: str) -> list[str]:
    """The fenced blocks of a page that stand right below the comment `<!-- marker -->`."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"<!-- {marker} -->\n```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def recipes(path: Path) -> list[str]:
    """The marked ones, and those that name themselves in their first line."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(r"^```yaml\n(# recipe\.yaml\n.*?)^```", text, flags=re.DOTALL | re.MULTILINE) + blocks(
        path, "recipe", "yaml"
    )


def own_options() -> list[list[str]]:
    inherited = {f.name for f in fields(SFTConfig)}
    rows = []
    for option in fields(TAIDConfig):
        if option.name not in inherited:
            assert option.default is not MISSING
            rows.append([f"`{option.name}`", f"`{yaml_of(option.default)}`", option.metadata["help"]])
    return rows


def yaml_of(value: object) -> str:
    return yaml.safe_dump(value).removesuffix("...\n").strip()


def option_table() -> str:
    lines = ["| option | default | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in own_options())]
    return "\n".join(lines)


def signatures() -> list[str]:
    return [
        f"{name}{inspect.signature(getattr(objectives, name))}".replace("'", "") for name in sorted(objectives.__all__)
    ]


# --- files ------------------------------------------------------------------------------------------------------------


def modules_named(path: Path) -> dict[str, str]:
    """Module -> its line in the fenced tree of a page: the lines below `src/taid/` that are indented deeper."""
    lines = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
    root = next((line for line in lines if line.split()[:1] == ["src/taid/"]), None)
    assert root is not None, f"{path} has no line `src/taid/` with the modules below it"
    depth, named = len(root) - len(root.lstrip()), {}
    for line in lines:
        if not line.strip() or len(line) - len(line.lstrip()) <= depth:
            break
        name, *words = line.split()
        if name.endswith(".py"):
            assert name not in named, f"{path} names {name} twice"
            named[name] = " ".join(words)
    return named


@pytest.mark.parametrize("path", [Path("README.md"), Path("docs/design.md")], ids=str)
def test_a_file_tree_is_the_files(path):
    named = modules_named(path)
    assert sorted(named) == sorted(file.name for file in (ROOT / "src" / "taid").glob("*.py"))
    assert [name for name, words in named.items() if not words] == []


def targets(path: Path) -> set[str]:
    """What a page links to, relative to its folder; fenced blocks and other hosts are left out."""
    text = re.sub(r"^```.*?^```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(\s*<?([^)>\s]+)", text) + re.findall(r"\b(?:src|href)=\"([^\"]+)\"", text)
    return {link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)}


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_lead_somewhere(path):
    assert [link for link in targets(path) if not (ROOT / path).parent.joinpath(link).exists()] == []


def test_files_that_the_configurations_name_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = {page for entry in navigation for page in entry.values()}
    for name in (project["readme"], *project["license-files"], *(f"docs/{page}" for page in pages)):
        assert (ROOT / name).is_file(), name
    assert pages == {str(path.relative_to("docs")) for path in PAGES if path.parts[0] == "docs"}


# --- options, names, recipes ------------------------------------------------------------------------------------------


def test_the_reference_has_every_own_option_with_its_default_and_help():
    assert option_table() in REFERENCE.read_text(encoding="utf-8"), "paste what `python tests/test_docs.py` prints"


def test_the_reference_has_every_public_name_and_signature():
    text = REFERENCE.read_text(encoding="utf-8")
    assert [name for name in taid.__all__ if f"taid.{name}" not in text] == []
    assert [signature for signature in signatures() if signature not in text] == []
    for cls in (taid.TAIDTrainer, taid.TAIDSchedule):
        shown = re.search(rf"{cls.__name__}\(\n(.*?)\n\)", text, flags=re.DOTALL)
        assert shown is not None, cls.__name__
        expected = [str(p).replace("'", "") for p in inspect.signature(cls).parameters.values()]
        assert re.sub(r",\s*$", "", shown[1]).split(",\n    ") == ["    " + expected[0], *expected[1:]]


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_recipes_are_valid(path, tmp_path):
    for number, recipe in enumerate(recipes(path)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(recipe, encoding="utf-8")
        options = ["--use_cpu", "true", *([] if "output_dir" in recipe else ["--output_dir", str(tmp_path)])]
        parse(["--config", str(file), *options])


def test_there_are_recipes_and_programs_to_check():
    assert sum(len(recipes(path)) for path in PAGES) >= 3
    assert sum(len(blocks(path, "run", "python")) for path in PAGES) >= 2


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "run", "python")], ids=str)
def test_programs_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src", target_is_directory=True)
    for program in blocks(path, "run", "python"):
        exec(compile(program, str(path), "exec"), {"__name__": "__main__"})


@pytest.mark.cli
def test_the_example_runs(tmp_path, student_folder, teacher_folder):
    example = shutil.copy(ROOT / "examples" / "first_distillation.py", tmp_path)
    arguments = [str(student_folder), str(teacher_folder), "--steps", "2", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, example, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "KL to the teacher" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()


if __name__ == "__main__":
    print(option_table(), *signatures(), sep="\n")
