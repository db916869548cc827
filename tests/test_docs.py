"""The documentation: what it says of files, options, names and commands is what there is.

Every fenced block is checked by its language, so that no snippet escapes:

    python  runs where `<!-- run -->` stands above it; `<!-- signature -->` is compared with the real one; any other is
            compiled, its imports are made and the arguments of its calls bound
    sh      each command is parsed by its own parser, and runs where `<!-- run -->` stands above it
    yaml    is a recipe: its options exist, and their values are possible
    json    is a row of data, on each line; `<!-- prompts -->`: what a judge's questions are
    text    is output or a formula, and holds no command

A page's `run` blocks share a folder, in their order; `# name.yaml` in the first line of a recipe puts it there.

`python tests/test_docs.py` prints the tables of docs/reference.md, to be pasted after an option or a signature changed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import yaml
from markdown.extensions.toc import slugify
from matplotlib.image import imread
from trl import SFTConfig

import taid
from command_line import Command
from taid import objectives
from taid.cli import main
from taid.config.arguments import COMMANDS, option_parser
from taid.config.parsing import CLASSES, parse
from taid.config.training import TAIDConfig
from taid.data import loading
from taid.evaluation import judge

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("*.md", "docs/**/*.md", "recipes/*.md")
PAGES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(folder))
REFERENCE = ROOT / "docs" / "reference.md"

_FENCE = re.compile(r"(?:<!-- (\w+) -->\n)?^( *)```(\w*)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block, with the word of the comment right above it."""

    marker: str
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name that a recipe gives itself in its first line."""
        name = re.match(r"# ([\w.-]+\.yaml)\n", self.text)
        return name and name[1]


def blocks(path: Path) -> list[Block]:
    found = _FENCE.findall((ROOT / path).read_text(encoding="utf-8"))
    return [Block(marker, language, textwrap.dedent(text)) for marker, _, language, text in found]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", (ROOT / path).read_text(encoding="utf-8"))


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
    """Path below `src/taid/` -> its line in the fenced tree of a page; packages are the lines that end with a slash."""
    lines = iter((ROOT / path).read_text(encoding="utf-8").splitlines())
    root = next((line for line in lines if line.split()[:1] == ["src/taid/"]), None)
    assert root is not None, f"{path} has no line `src/taid/` with the modules below it"
    parents, named = [(len(root) - len(root.lstrip()), "")], dict[str, str]()
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if not line.strip() or depth <= parents[0][0]:
            break
        while depth <= parents[-1][0]:
            parents.pop()
        name, *words = line.split()
        if name.endswith("/") and not words:
            parents.append((depth, parents[-1][1] + name))
        elif name.endswith(".py"):
            name = parents[-1][1] + name
            assert name not in named, f"{path} names {name} twice"
            named[name] = " ".join(words)
    return named


def test_the_tree_of_the_design_is_the_files():
    named = modules_named(Path("docs/design.md"))
    package = ROOT / "src" / "taid"
    files = [file.relative_to(package).as_posix() for file in package.rglob("*.py")]
    shown = {file for file in files if not file.endswith("/__init__.py")}
    tree = "the tree in docs/design.md, one line a module"
    assert sorted(shown - set(named)) == [], f"{tree}: add these with a few words each"
    assert sorted(set(named) - shown) == [], f"{tree}: these are gone, remove their lines"
    assert [name for name, words in named.items() if not words] == [], f"{tree}: say what these are for"


def links(path: Path) -> list[str]:
    """Return what a page links to, fenced blocks and code left out."""
    text = re.sub(r"`[^`]*`", "", prose(path))
    return re.findall(r"\]\(\s*<?([^)>\s]+)", text) + re.findall(r"\b(?:src|href)=\"([^\"]+)\"", text)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {slugify(re.sub(r"[`*]|\]\([^)]*\)", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_lead_somewhere(path):
    inside = [link.partition("#") for link in links(path) if not re.match(r"[a-z]+:", link)]
    assert [name for name, _, _ in inside if not (ROOT / path).parent.joinpath(name).exists()] == []
    for name, _, anchor in inside:
        page = (ROOT / path).parent / name if name else ROOT / path
        assert not anchor or anchor in anchors(page.resolve().relative_to(ROOT)), f"{name}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_links_to_other_hosts_are_https_and_well_formed(path):
    for link in [*filter(re.compile(r"[a-z]+:").match, links(path)), *re.findall(r"<(\w+://[^>]*)>", prose(path))]:
        address = urlsplit(link)
        assert address.scheme == "https", link
        assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", address.netloc), link
        assert re.fullmatch(r"(/[\w.@~-]+)*/?", address.path), link


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_files_of_the_repository_that_a_page_names_exist(path):
    folders = "benchmarks docs examples recipes scripts src tests".split()
    named = re.findall(rf"`((?:{'|'.join(folders)})/[\w./-]+)`", prose(path))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_pictures_are_drawn_by_the_script(tmp_path):
    pictures = runpy.run_path(str(ROOT / "scripts" / "draw_pictures.py"))["PICTURES"]
    pictures |= runpy.run_path(str(ROOT / "benchmarks" / "evidence" / "figures.py"))["PICTURES"]
    of_an_example = {"mode_averaging.png"}  # tests/test_examples.py draws it
    assert {file.name for file in (ROOT / "docs" / "pictures").iterdir()} == set(pictures) | of_an_example
    shown = {link for path in PAGES for link in links(path)}
    for name, draw in pictures.items():
        assert f"pictures/{name}" in shown
        draw().savefig(tmp_path / name, facecolor="white")
        old, new = (imread(folder / name) for folder in (ROOT / "docs" / "pictures", tmp_path))
        assert old.shape == new.shape
        assert abs(old - new).mean() < 0.02  # another matplotlib may move a label by a pixel


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


def test_the_reference_has_every_command():
    text = REFERENCE.read_text(encoding="utf-8")
    assert [command for command in commands_of_taid() if f"| `taid {command} " not in text] == []


def test_the_reference_has_every_public_name_and_signature():
    text = REFERENCE.read_text(encoding="utf-8")
    assert [name for name in taid.__all__ if f"taid.{name}" not in text] == []
    assert [signature for signature in signatures() if signature not in text] == []
    for cls in (taid.TAIDTrainer, taid.TAIDSchedule):
        shown = re.search(rf"{cls.__name__}\(\n(.*?)\n\)", text, flags=re.DOTALL)
        assert shown is not None, cls.__name__
        expected = [str(p).replace("'", "") for p in inspect.signature(cls).parameters.values()]
        assert re.sub(r",\s*$", "", shown[1]).split(",\n    ") == ["    " + expected[0], *expected[1:]]


# --- fenced blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_every_block_is_checked(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, found = (ROOT / path).read_text(encoding="utf-8"), blocks(path)
    fences = re.findall(r"^[ >]*(?:```|~~~)", text, flags=re.MULTILINE)
    assert len(fences) == 2 * len(found), "a fence that this test does not read"
    marks = re.findall(r"^<!-- (?:run|recipe|signature|prompts) -->$", text, flags=re.MULTILINE)
    assert len(marks) == sum(block.marker != "" for block in found), "a mark that stands above no block"
    for block in found:
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
    for block in found:
        assert block.language in CHECKS, f"a block in {block.language or 'no language'}, which nothing checks"
        assert block.marker in ("", *MARKERS.get(block.language, ())), f"no {block.language} is marked {block.marker}"
        CHECKS[block.language](block)


def check_python(block: Block) -> None:
    if block.marker == "signature":
        for statement in re.split(r"\n(?=\w)", block.text.strip()):
            name, shown = statement.partition("(")[0], dict[str, object]()
            exec(f"from __future__ import annotations\ndef {statement}: ...", shown)
            real = getattr(taid, name) if name in taid.__all__ else getattr(objectives, name)
            of_both = [inspect.signature(function).parameters.values() for function in (shown[name], real)]
            assert len({str([(p.name, p.kind, p.default) for p in parameters]) for parameters in of_both}) == 1, name
        return
    names, tree = {}, ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):  # a module of a package
                    importlib.import_module(f"{node.module}.{alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and inspect.isclass(names.get(node.func.id)):
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(names[node.func.id]).bind_partial(**keywords)


def check_yaml(block: Block) -> None:
    file = Path("block.yaml")
    file.write_text(block.text, encoding="utf-8")
    parse(["--config", str(file), *([] if "use_cpu" in block.text else ["--use_cpu", "true"])])


def check_json(block: Block) -> None:
    if block.marker == "prompts":
        Path("prompts.jsonl").write_text(block.text, encoding="utf-8")
        judge.read_prompts("prompts.jsonl")
        return
    for number, line in enumerate(block.text.splitlines(), start=1):
        loading.RowCheck("text")(json.loads(line), f"line {number}")


def check_text(block: Block) -> None:
    assert not re.search(r"^(\$ |(taid|make|python|pip) \w)", block.text, flags=re.MULTILINE), "a command: write sh"


def check_shell(block: Block) -> None:
    for words in commands(block.text):
        check_command(words)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without comments, prompts and variables set in front."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for command in re.split(r"&&|\|", re.sub(r"^\$ ", "", line)):
            words = shlex.split(command, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                yield words


# What is called that is not ours; anything else in a shell block is an error here.
_OTHERS = ". cd cmake git grep hf llama-completion lm_eval ollama pip vllm".split()


def check_command(words: list[str]) -> None:
    """Its options exist and have values of the right type; files of ours that it names exist."""
    place = next(
        (i for i, word in enumerate(words) if Path(word).name == "taid" and words[:i][-1:] in ([], ["-m"])), None
    )
    program = words[0].rpartition("/")[2]
    if place is not None:
        check_launcher(words[:place])
        check_taid(words[place + 1 :] or ["--help"])
    elif program == "make":
        targets = re.findall(r"^([\w/.-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), words
    elif program == "python" and words[1:3] == ["-m", "pytest"]:
        check_pytest(words[3:])
    elif program == "python":
        source = (ROOT / words[1]).read_text(encoding="utf-8")
        assert [word for word in words[2:] if word.startswith("--") and f'"{word.split("=")[0]}"' not in source] == []
    else:
        assert program in _OTHERS, f"{program}: nothing checks this command"


def check_launcher(words: list[str]) -> None:
    if words[:1] == ["torchrun"]:
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*words[1:], "taid"])
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch_command_parser().parse_args([*words[2:], "taid"])
    else:
        assert words in ([], ["python", "-m"]), words


def check_taid(words: list[str]) -> None:
    """Parse it by the parsers of the command line itself; a configuration that is not there is left away."""
    command, *rest = words
    if "--help" in words:
        assert command == "--help" or options_of(command)
        return
    if command not in COMMANDS:
        main._parser().parse_args(words)
        return
    if "--config" in rest and not Path(rest[rest.index("--config") + 1]).exists():
        del rest[rest.index("--config") : rest.index("--config") + 2]
    for option, value in beside_the_configuration(command):
        if option in rest:
            del rest[rest.index(option) : rest.index(option) + (2 if value else 1)]
    parse(rest, command)


def check_pytest(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("-k", default="")
    parser.add_argument("-m")
    options = parser.parse_args(words)
    for file in options.files:
        functions = [node for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
                     if isinstance(node, ast.FunctionDef)]  # fmt: skip
        is_slow = {function.name: "pytest.mark.slow" in map(ast.unparse, function.decorator_list)
                   for function in functions if function.name.startswith("test_")}  # fmt: skip
        for word in set(re.findall(r"\w+", options.k)) - {"and", "or", "not"}:
            found = [test for test in is_slow if word in test]
            assert found, f"{file} has no test with {word!r} in its name"
            assert options.m is not None or not any(is_slow[test] for test in found), f"{file} -k {word} needs -m ''"


def beside_the_configuration(command: str) -> list[tuple[str, str]]:
    """The options of a command that are no fields, as its usage shows them: `[--repair]`, `[--gpus N]`."""
    return re.findall(r"\[(--[a-z_]+)( [A-Z,]+)?\]", COMMANDS[command][0])


def options_of(command: str) -> set[str]:
    """Every ``--option`` of a command of taid's."""
    if command in COMMANDS:
        parser = option_parser(command, CLASSES, show_all=True)
        return {*parser._option_string_actions, *(option for option, _ in beside_the_configuration(command))}
    return set(commands_of_taid()[command]._option_string_actions)


def commands_of_taid() -> dict[str, argparse.ArgumentParser]:
    return next(a.choices for a in main._parser()._actions if isinstance(a, argparse._SubParsersAction))


CHECKS = {
    "python": check_python,
    "sh": check_shell,
    "console": check_shell,
    "yaml": check_yaml,
    "json": check_json,
    "text": check_text,
}
MARKERS = {
    "python": ("run", "signature"),
    "sh": ("run",),
    "console": ("run",),
    "yaml": ("recipe",),
    "json": ("prompts",),
}


@pytest.mark.parametrize("path", PAGES, ids=str)
def test_commands_within_a_sentence_exist(path):
    for code in re.findall(r"`([^`]+)`", prose(path)):
        name, *rest = code.split(maxsplit=2)
        if name == "taid" and rest:
            unknown = set(re.findall(r"--[a-z]\w*", code)) - options_of(rest[0])
            assert not unknown, f"{code}: taid {rest[0]} has no {unknown}"
        elif name in ("make", "python") and rest:
            check_command(shlex.split(code))


def runs(path: Path) -> list[Block]:
    return [block for block in blocks(path) if block.marker == "run"]


def as_cases(paths: list[Path]) -> list[object]:
    """Pages, those marked cli of which a command is run."""
    with_commands = {path for path in paths if any(block.language != "python" for block in runs(path))}
    return [pytest.param(path, marks=[pytest.mark.cli] if path in with_commands else []) for path in paths]


@pytest.mark.parametrize("path", as_cases([path for path in PAGES if runs(path)]), ids=str)
def test_programs_run(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    (tmp_path / "src").symlink_to(ROOT / "src", target_is_directory=True)
    for block in blocks(path):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        if block.marker == "run" and block.language == "python":
            exec(compile(block.text, str(path), "exec"), {"__name__": "__main__"})
        elif block.marker == "run":
            # The same with two steps: how far a run comes is not what is tested.
            script = re.sub(r"^taid train .*", r"\g<0> --max_steps 2", block.text, flags=re.MULTILINE)
            done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-3000:]


def test_there_are_blocks_to_check():
    found = [block for path in PAGES for block in blocks(path)]
    assert sum(block.language == "yaml" for block in found) >= 3
    assert sum(block.marker == "run" and block.language == "python" for block in found) >= 4
    assert sum(block.marker == "run" and block.language == "sh" for block in found) >= 1


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        (Block("", "sh", "taid train --config r.yaml --learning_rat 1e-4\n"), "did you mean 'learning_rate'"),
        (Block("", "sh", "taid train --learning_rate fast\n"), "invalid float value: 'fast'"),
        (Block("", "sh", "taid train --objective \\\n  forward_lk\n"), "forward_kl"),
        (Block("", "console", "$ taid report  # of which run?\n"), "2"),
        (Block("", "sh", "accelerate launch --processes 2 -m taid train\n"), "2"),
        (Block("", "sh", "curl example\n"), "nothing checks this command"),
        (Block("", "sh", "make install && make love\n"), "love"),
        (Block("", "sh", "python benchmarks/teacher.py quality --no_such_option\n"), "no_such_option"),
        (Block("", "sh", "python -m pytest tests/test_docs.py -k no_such_name\n"), "no_such_name"),
        (Block("", "yaml", "objektive: taid\n"), "did you mean 'objective'"),
        (Block("", "json", '{"prompt": "a row without a completion"}\n'), "line 1: the row needs"),
        (Block("", "python", "from taid import TAIDConfig\nTAIDConfig(learning_rat=1)\n"), "learning_rat"),
        (Block("signature", "python", "TAIDSchedule(total_steps, t_start=0.3)\n"), "TAIDSchedule"),
        (Block("", "text", "taid report runs/first\n"), "a command: write sh"),
    ],
    ids=lambda value: value.text.strip() if isinstance(value, Block) else "",
)
def test_what_is_wrong_in_a_block_is_found(block, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # SystemExit is argparse's, with status 2.
    with pytest.raises((ValueError, TypeError, AssertionError, SystemExit), match=re.escape(complaint)):
        CHECKS[block.language](block)


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def texts_in_the_source() -> list[str]:
    """Every text of the package, with … for what is filled in, but for constants."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "src" / "taid").glob("**/*.py")]
    assignments = (node for tree in trees for node in tree.body if isinstance(node, ast.Assign))
    constants = {ast.unparse(node.targets[0]): node.value.value for node in assignments if is_text(node.value)}

    def text_of(node: ast.AST) -> str:
        if isinstance(node, ast.BinOp):
            return text_of(node.left) + text_of(node.right)
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text_of, node.values))
        if isinstance(node, ast.Constant):
            return str(node.value)
        name = node.value if isinstance(node, ast.FormattedValue) else node
        return constants.get(name.id, "…") if isinstance(name, ast.Name) else "…"

    nodes = (node for tree in trees for node in ast.walk(tree))
    return [text_of(node) for node in nodes if is_text(node) or isinstance(node, ast.BinOp | ast.JoinedStr)]


def test_troubleshooting_quotes_what_is_really_said():
    source = texts_in_the_source()
    quoted = [block.text for block in blocks(Path("docs/troubleshooting.md")) if block.language == "text"]
    lines = [line.removeprefix("taid: error: ") for text in quoted for line in re.sub(r"\n +", " ", text).splitlines()]
    assert len(lines) > 20
    for line in lines:
        in_this_order = re.compile(".*".join(map(re.escape, line.split("…"))))
        assert any(map(in_this_order.search, source)), line


@pytest.mark.cli
def test_the_example_runs(tmp_path, student_folder, teacher_folder):
    example = shutil.copy(ROOT / "examples" / "first_distillation.py", tmp_path)
    arguments = [str(student_folder), str(teacher_folder), "--steps", "2", "--output_dir", str(tmp_path / "run")]
    done = Command(arguments, code=Path(example).read_text(encoding="utf-8"))
    done.communicate(timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "KL to the teacher" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()


if __name__ == "__main__":
    print(option_table(), *signatures(), sep="\n")


def test_the_tables_of_the_evidence_are_those_of_its_numbers():
    script = ROOT / "benchmarks" / "evidence" / "figures.py"

    checked = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)

    assert checked.returncode == 0, checked.stderr
