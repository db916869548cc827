"""The shape of the house: lengths, layers, names that exist, options in use. The source is read, and never imported.

`python tests/test_architecture.py [checkout ...]` prints the shape of this checkout, or of others, in one table.
`python tests/test_architecture.py --shrink` lowers the exceptions in tests/may_only_shrink.json to what is needed.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXCEPTIONS = ROOT / "tests" / "may_only_shrink.json"
FILE_LINES = 450
FUNCTION_LINES = 60
LIBRARIES = ("accelerate", "datasets", "peft", "torch", "transformers", "trl")  # whose names are not ours to check
Function = ast.FunctionDef | ast.AsyncFunctionDef


# ---- reading the source


def _sources(checkout: Path) -> dict[str, Path]:
    """Module name -> file, for every module of taid."""
    modules = {}
    for file in sorted((checkout / "src" / "taid").rglob("*.py")):
        parts = file.relative_to(checkout / "src").with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _number_of_lines(files: Iterator[Path] | list[Path]) -> int:
    return sum(_text(file).count("\n") for file in files)


def _imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, str | None]]:
    """Yield each import of a module of taid, lazy and type-only ones too: the module, and the name taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield (submodule, None) if submodule in known else (str(node.module), alias.name)


def import_graph(checkout: Path) -> dict[str, set[str]]:
    """Module -> the modules of taid that it imports."""
    known = _sources(checkout)
    return {
        module: {target for target, _ in _imported(_tree(file), known)} - {module} for module, file in known.items()
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules, each of which reaches each other one (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            start = stack.index(module)
            found.append(sorted(stack[start:]))
            del stack[start:]

    for module in sorted(graph):
        if module not in index:
            visit(module)
    return [group for group in found if len(group) > 1]


def storeys(graph: dict[str, set[str]]) -> int:
    """Number of modules on the longest chain of imports; a circle counts as many storeys as it has modules."""
    home = {module: group[0] for group in circles(graph) for module in group}

    @functools.cache
    def height(storey: str) -> int:
        members = [module for module in graph if home.get(module, module) == storey]
        below = {home.get(target, target) for module in members for target in graph[module]} - {storey}
        return len(members) + max((height(target) for target in below), default=0)

    return max(height(home.get(module, module)) for module in graph)


def long_files(checkout: Path) -> dict[str, int]:
    """Files of the package with more than 450 lines, with their lines."""
    lines = {
        file.relative_to(checkout).as_posix(): _text(file).count("\n") for file in (checkout / "src/taid").rglob("*.py")
    }
    return {name: number for name, number in sorted(lines.items()) if number > FILE_LINES}


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield f"{prefix}{child.name}", child
            yield from _functions(child, f"{prefix}{child.name}.")
        else:
            yield from _functions(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


def long_functions(checkout: Path) -> dict[str, int]:
    """Functions of the package with more than 60 lines, by name alone: one may move to another file."""
    found: dict[str, int] = {}
    for file in _sources(checkout).values():
        for name, node in _functions(_tree(file), ""):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                found[name] = max(lines, found.get(name, 0))
    return dict(sorted(found.items()))


def private_imports(checkout: Path) -> dict[str, int]:
    """How often a package takes a name that begins with one underscore from another, by `module: _name`."""
    known = _sources(checkout)
    found: dict[str, int] = {}

    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    def private(name: str | None) -> bool:
        return bool(name) and str(name).startswith("_") and not str(name).startswith("__")

    for module, file in known.items():
        tree = _tree(file)
        taken = [(target, name) for target, name in _imported(tree, known) if private(name)]
        local = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if f"{node.module}.{alias.name}" in known
        }
        taken += [
            (local[node.value.id], node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in local
            if private(node.attr)
        ]
        for target, name in taken:
            if package(target) != package(module):
                key = f"{module.removeprefix('taid.')} takes {target.removeprefix('taid.')}.{name}"
                found[key] = found.get(key, 0) + 1
    return dict(sorted(found.items()))


def own_options(checkout: Path) -> list[str]:
    """The fields that taid's classes give to TAIDConfig, beside SFTConfig's."""
    classes = {
        node.name: node
        for file in _sources(checkout).values()
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.ClassDef)
    }

    def fields(name: str) -> Iterator[str]:
        if node := classes.get(name):
            for base in node.bases:
                yield from fields(ast.unparse(base))
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield item.target.id

    found = list(fields("TAIDConfig"))
    assert "objective" in found, "TAIDConfig has no option `objective`: its options are looked for in the wrong place"
    return found


def unused_options(checkout: Path) -> dict[str, int]:
    """Own options that no recipe, example, benchmark or piece of code in the documentation gives a value.

    docs/reference.md lists all of them, and so is no use.
    """
    texts = [
        _text(file)
        for folder in ("recipes", "examples", "benchmarks", "scripts")
        for file in (checkout / folder).rglob("*")
        if file.suffix in (".yaml", ".py", ".sh", ".md")
    ]
    pages = [checkout / "README.md", *(checkout / "docs").glob("*.md")]
    texts += [
        code
        for page in pages
        if page.stem != "reference"
        for code in re.findall(r"```.*?```|`[^`\n]+`", _text(page), re.DOTALL)
    ]
    everything = "\n".join(texts)
    return {
        option: 1
        for option in own_options(checkout)
        if not re.search(rf"--{option}\b|\b{option}[\"']?\s*[:=]", everything)
    }


def import_circles(checkout: Path) -> dict[str, int]:
    """The number of files that stand in circles, if any."""
    number = sum(map(len, circles(import_graph(checkout))))
    return {"files": number} if number else {}


def names_of_nothing(checkout: Path, page: str) -> list[str]:
    """Files and names in backquotes on a page that are neither in the repository nor in its code.

    A path may leave out ``src/taid/``. The last part of a dotted name has to be a word of the source, the tests, the
    scripts or the settings.
    """
    files = [
        file for folder in ("src", "tests", "scripts", "benchmarks") for file in (checkout / folder).rglob("*.[pc]*")
    ]
    files += [checkout / name for name in ("pyproject.toml", "Makefile", "mkdocs.yml")]
    words = {
        word for file in files if file.is_file() and file.suffix != ".pyc" for word in re.findall(r"\w+", _text(file))
    }
    names = {file.stem for file in files} | {file.name for file in files}
    prose = re.sub(r"```.*?```", "", _text(checkout / page), flags=re.DOTALL)
    gone = set()
    for name in re.findall(r"`([^`\s]+)`", prose):
        bare = name.removesuffix("()")
        if "/" in bare or re.search(r"\.(py|c|md|toml)$", bare):
            places = [checkout, checkout / "src/taid", checkout / "src/taid/losses"]
            here = bare in names or any(place.joinpath(*bare.split("/")).exists() for place in places)
        elif re.fullmatch(r"[A-Za-z_][\w.]*[^\W_]", bare):
            here = bare.rpartition(".")[2] in words | names or bare.split(".")[0] in LIBRARIES
        else:
            continue
        if not here:
            gone.add(name)
    return sorted(gone)


def names_of_nothing_for_contributors(checkout: Path) -> dict[str, int]:
    """The names of nothing on the pages that show where to change the code."""
    pages = ("CONTRIBUTING.md", "docs/design.md")
    return {f"{page}: {name}": 1 for page in pages for name in names_of_nothing(checkout, page)}


# ---- exceptions that may only shrink


def _exceptions() -> dict[str, dict[str, int]]:
    return json.loads(_text(EXCEPTIONS))


MEASURES = {
    "import_circles": import_circles,
    "long_files": long_files,
    "long_functions": long_functions,
    "private_imports": private_imports,
    "unused_options": unused_options,
    "names_of_nothing": names_of_nothing_for_contributors,
}


def _check(kind: str) -> None:
    """Nothing is more than allowed, and nothing more is allowed than there is."""
    found, allowed = MEASURES[kind](ROOT), _exceptions().get(kind, {})
    beyond = {name: size for name, size in found.items() if size > allowed.get(name, 0)}
    assert not beyond, f"{kind}: {beyond} is more than tests/may_only_shrink.json allows: {allowed}"
    unused = {name: size for name, size in allowed.items() if size > found.get(name, 0)}
    assert not unused, f"{kind}: {unused} is more than needed: python tests/test_architecture.py --shrink"


def shrink() -> None:
    """Lower every exception to its present size, and drop those that are not needed. Nothing grows."""
    kept = _exceptions()
    for kind, measure in MEASURES.items():
        found = measure(ROOT)
        kept[kind] = {name: min(size, found[name]) for name, size in kept.get(kind, {}).items() if name in found}
    EXCEPTIONS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def test_no_file_is_longer_than_450_lines():
    _check("long_files")


def test_no_function_is_longer_than_60_lines():
    _check("long_functions")


def test_no_package_takes_a_private_name_from_another():
    _check("private_imports")


def test_each_own_option_is_used_by_a_recipe_an_example_a_benchmark_or_the_documentation():
    _check("unused_options")


def test_no_files_import_each_other_in_a_circle():
    _check("import_circles")


def test_the_contracts_of_pyproject_hold():
    """The layers, the order inside training, TRL's place, artifacts without torch."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--no-cache"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_pages_for_contributors_name_exists():
    _check("names_of_nothing")


def test_a_name_of_nothing_is_found(tmp_path):
    (tmp_path / "src/taid/losses").mkdir(parents=True)
    (tmp_path / "src/taid/losses/fused.py").write_text("class Head:\n    rows = 3\n", encoding="utf-8")
    words = "`Head.rows`, `losses/fused.py`, `losses/`, `src/taid/losses/fused.py`, `student_`"
    words += "`Head.gone`, `losses/gone.py`, `gone`, `gone.py`"
    (tmp_path / "page.md").write_text(words, encoding="utf-8")
    assert names_of_nothing(tmp_path, "page.md") == ["Head.gone", "gone", "gone.py", "losses/gone.py"]


def test_the_tool_finds_a_circle_and_counts_storeys():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": set()}
    assert circles(graph) == [["b", "c"]]
    assert storeys(graph) == 4


# ---- the table


def shape(checkout: Path) -> dict[str, int]:
    graph = import_graph(checkout)
    readme = checkout / "README.md"
    return {
        "files on the top level": len(list((checkout / "src/taid").glob("*.py"))),
        "files of source": len(_sources(checkout)),
        "storeys (longest import chain)": storeys(graph),
        "import circles": len(circles(graph)),
        "files in circles": sum(map(len, circles(graph))),
        "files over 450 lines": len(long_files(checkout)),
        "functions over 60 lines": len(long_functions(checkout)),
        "names on contributors' pages that do not exist": len(names_of_nothing_for_contributors(checkout)),
        "private imports across packages": sum(private_imports(checkout).values()),
        "own options": len(own_options(checkout)),
        "own options without a use": len(unused_options(checkout)),
        "lines of source": _number_of_lines((checkout / "src/taid").rglob("*.py")),
        "lines of tests": _number_of_lines((checkout / "tests").rglob("*.py")),
        "lines of docs": _number_of_lines((checkout / "docs").rglob("*.md")),
        "words of docs": sum(len(_text(page).split()) for page in (checkout / "docs").rglob("*.md")),
        "words of README": len(_text(readme).split()),
        "lines of README": _text(readme).count("\n"),
    }


def main(arguments: list[str]) -> None:
    if arguments == ["--shrink"]:
        shrink()
        return
    checkouts = [Path(argument).resolve() for argument in arguments] or [ROOT]
    shapes = [shape(checkout) for checkout in checkouts]
    print("| |", " | ".join(argument for argument in arguments or ["here"]), "|")
    print("|---|", "|".join("---:" for _ in checkouts), "|", sep="")
    for name in shapes[0]:
        print("|", name, "|", " | ".join(f"{numbers[name]:,}" for numbers in shapes), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
