"""`docs/commands` says what the commands say about themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from cli.common import flags
from cli.document import FOLDER, REGENERATE, command_named, main, pages
from config.schemas import COMMANDS
from config.tables import walk

ROOT = Path(__file__).parents[2]
PAGES = pages()


def cells(text: str) -> list[list[str]]:
    """The rows of all tables as GitHub would divide them."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level == 4:  # in a table, its head or body, a row, a cell
            rows[-1].append(token.content)
    return rows


def test_the_pages_are_up_to_date() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / FOLDER).iterdir()}
    stale = sorted(name for name in there.keys() | PAGES.keys() if there.get(name) != PAGES.get(name))
    assert not stale, f"{', '.join(stale)} in {FOLDER}: run `{REGENERATE}` (and delete pages of commands that are gone)"


def test_they_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    assert main(["--folder", str(tmp_path / "pages")]) == 0
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "pages").iterdir()} == PAGES


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_and_setting_is_in_a_table(name: str) -> None:
    rows = cells(PAGES[f"{name}.md"])
    heads = {row[0].strip("`").replace("\\|", "|") for row in rows}
    assert {flag for flag, _ in flags(command_named(name))} <= heads
    for path, annotation in walk(COMMANDS[name]):
        assert path[-1] in heads or is_a_choice(PAGES[f"{name}.md"], path[-1], annotation), path


def is_a_choice(text: str, setting: str, annotation: Any) -> bool:
    """A setting that chooses a table's kind stands in a heading."""
    (value,) = annotation.__args__
    return f'`{setting} = "{value}"`' in text or f'#### `"{value}"`' in text


@pytest.mark.parametrize("name", PAGES)
def test_tables_hold_together(name: str) -> None:
    """No bar or line break in a text takes a table apart, and nothing but a heading lacks its meaning."""
    rows = cells(PAGES[name])
    lines = [line for line in PAGES[name].splitlines() if line.startswith("| ")]
    assert [len(row) + 1 for row in rows] == [len(re.findall(r"(?<!\\)\|", line)) for line in lines] != []
    assert {row[0] for row in rows if not row[-1]} <= {"Command", "Flag", "Setting", "Code"}
