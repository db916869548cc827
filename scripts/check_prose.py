"""Find sentences of more than 25 words in README.md and docs/, and docstrings that begin without a main clause.

python scripts/check_prose.py            fails where a file has more of them than tests/may_only_shrink.json allows
python scripts/check_prose.py --list     shows each
python scripts/check_prose.py --shrink   lowers what is allowed to what there is
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ROOT / "tests" / "may_only_shrink.json"
WORDS = 25
# A docstring says what a function does or what a class is. These begin a clause that stands on no verb.
NO_MAIN_CLAUSE = ("What", "Of", "That", "Whose", "Where", "By", "As", "In which", "For which", "To which")


def sentences(markdown: str) -> Iterator[tuple[int, str]]:
    """Yield each sentence of the prose with its line; code, tables and headings are none."""
    blank = re.sub(r"```.*?```|<!--.*?-->", lambda block: "\n" * block[0].count("\n"), markdown, flags=re.DOTALL)
    paragraph: list[str] = []
    begins = 0
    for number, line in enumerate([*blank.splitlines(), ""], 1):
        text = line.strip()
        is_item = re.match(r"([-*+]|\d+\.) ", text)
        if is_item or not text or text[0] in "|#<":
            yield from ((begins, sentence) for sentence in _split(" ".join(paragraph)))
            paragraph = []
        if text and text[0] not in "|#<":
            if not paragraph:
                begins = number
            paragraph.append(text[is_item.end() :] if is_item else text)


def _split(paragraph: str) -> list[str]:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)  # a link is its words
    text = re.sub(r"`[^`]*`", "code", text)  # and a piece of code one word
    return [sentence for sentence in re.split(r"(?<=[.!?])[)\"'*_]*\s+", text) if sentence.strip()]


def number_of_words(sentence: str) -> int:
    return len(re.findall(r"\w[^\s\u2014\u2013]*", sentence))


def long_sentences() -> Iterator[tuple[str, int, str]]:
    """Yield file, line and text of each sentence over 25 words."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line, sentence in sentences(page.read_text(encoding="utf-8")):
            if (words := number_of_words(sentence)) > WORDS:
                yield page.relative_to(ROOT).as_posix(), line, f"{words} words: {sentence}"


def clauses_alone() -> Iterator[tuple[str, int, str]]:
    """Yield file, line and first line of each docstring that begins without a main clause."""
    folders = ("src/taid", "tests", "scripts", "benchmarks", "examples")
    for file in sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split("\n")[0]
                if re.match(rf"({'|'.join(NO_MAIN_CLAUSE)})\b", words):
                    yield file.relative_to(ROOT).as_posix(), getattr(node, "lineno", 1), words


KINDS: dict[str, Callable[[], Iterator[tuple[str, int, str]]]] = {
    "long_sentences": long_sentences,
    "docstrings_without_a_main_clause": clauses_alone,
}


def counts(kind: str) -> dict[str, int]:
    """How many each file has."""
    found: dict[str, int] = {}
    for name, _, _ in KINDS[kind]():
        found[name] = found.get(name, 0) + 1
    return found


def main(arguments: list[str]) -> int:
    """Check, list or shrink; return the exit status."""
    allowed = json.loads(ALLOWED.read_text(encoding="utf-8"))
    if arguments == ["--list"]:
        for kind, find in KINDS.items():
            print(f"{kind}:", *(f"{name}:{line}: {text}" for name, line, text in find()), sep="\n")
        return 0
    if arguments == ["--shrink"]:
        for kind in KINDS:
            found = counts(kind)
            allowed[kind] = {name: min(n, found[name]) for name, n in allowed.get(kind, {}).items() if name in found}
        ALLOWED.write_text(json.dumps(allowed, indent=2) + "\n", encoding="utf-8")
        return 0
    status = 0
    for kind in KINDS:
        for name, number in counts(kind).items():
            if number > (most := allowed.get(kind, {}).get(name, 0)):
                print(f"{kind}: {name} has {number}, and may have {most}: see --list")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
