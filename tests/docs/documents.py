"""What the documents show: their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = tuple(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "trainkit/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
)
SHELL = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r" *```(\w*)")
_INLINE = re.compile(r"`(uv run [^`]+)`")
_STEPS = {"&&", ";"}


@dataclass(frozen=True)
class Block:
    """A code block."""

    document: str
    line: int
    """Of its first line of code."""
    section: str
    """The heading of second level above it."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Shown:
    """A command as a document shows it."""

    document: str
    line: int
    section: str
    words: tuple[str, ...]
    """Without assignments in front, redirection, and the programs that it is piped into."""
    output: str = ""
    """What the document says it prints, where it does."""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {' '.join(self.words)}"


@cache
def blocks(document: str) -> tuple[Block, ...]:
    found: list[Block] = []
    section, opened, language, code = "", 0, "", list[str]()
    for number, line in enumerate((ROOT / document).read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence and opened:
            found.append(Block(document, opened, section, language, "\n".join(code) + "\n"))
            opened = 0
        elif fence:
            opened, language, code = number + 1, fence[1], []
        elif opened:
            code.append(line)
        elif line.startswith("## "):
            section = line.removeprefix("## ")
    assert not opened, f"{document}:{opened}: a code block does not end"
    return tuple(found)


@cache
def commands(document: str) -> tuple[Shown, ...]:
    """All that can be typed into a shell: in shell blocks, after a `$`, and `uv run …` in the text."""
    found: list[Shown] = []
    for block in blocks(document):
        if block.language in SHELL:
            found += _lines(block)
        elif block.text.startswith("$ "):
            found += _session(block)
    return tuple(sorted([*found, *_inline(document)], key=lambda shown: shown.line))


def _lines(block: Block) -> Iterator[Shown]:
    continued, first = "", block.line
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        first = first if continued else number
        continued += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield from _parsed(block.document, first, block.section, continued)
            continued = ""
    assert not continued, f"{block.document}:{first}: the command does not end"


def _session(block: Block) -> Iterator[Shown]:
    """A `$` and what it prints."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, output = part.partition("\n")
        yield from _parsed(block.document, block.line, block.section, line, output)


def _inline(document: str) -> Iterator[Shown]:
    text = (ROOT / document).read_text(encoding="utf-8")
    without_blocks = re.sub(
        r"^ *```.*?^ *```|<!--.*?-->", lambda match: "\n" * match[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL
    )
    for match in _INLINE.finditer(without_blocks):
        before = without_blocks[: match.start()]
        section = before.rpartition("\n## ")[2].partition("\n")[0] if "\n## " in before else ""
        yield from _parsed(document, before.count("\n") + 1, section, match[1].replace("\n", " "))


def _parsed(document: str, line: int, section: str, text: str, output: str = "") -> Iterator[Shown]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in _STEPS:
            if words:
                yield Shown(document, line, section, _command(words), output)
            words = []
        else:
            words.append(word)


def _command(words: list[str]) -> tuple[str, ...]:
    """`NAME=value uv run program words | other > file` as `program words`."""
    ends = [words.index(word) for word in ("|", ">", ">>") if word in words]
    words = words[: min(ends, default=len(words))]
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return tuple(words[2:] if words[:2] == ["uv", "run"] else words)
