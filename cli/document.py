"""The pages of `docs/commands`: what the commands, their flags and their settings say about themselves.

uv run python -m cli.document
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cli.common import Command, flags
from config.rendering import DERIVED, Setting, settings
from config.schemas import COMMANDS, Experiment
from config.tables import defaults, documentation, fields, kinds, tag_of
from trainkit.artifacts import publish_file
from trainkit.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_NON_FINITE,
    EXIT_REQUEUE,
    EXIT_USAGE,
    EXIT_WATCHDOG,
)

FOLDER = Path("docs/commands")
REGENERATE = "uv run python -m cli.document"
RESOURCES = "../../config/resources"
NOTE = f"<!-- Written by `{REGENERATE}` from the command itself: change that, not this page. -->"

FEW = 3
"""Fewer settings than this are shown again for another kind of a table that has them too."""
Row = tuple[str, str, str]

EXIT_CODES = {
    0: "done",
    EXIT_FAILURE: "failure: a file that is missing or damaged, a disk that is full",
    EXIT_USAGE: "the command line or the configuration is wrong; nothing was done",
    EXIT_INTERRUPTED: "stopped by Ctrl-C",
}
TRAINING_EXIT_CODES = EXIT_CODES | {
    EXIT_NON_FINITE: "stopped: too many steps in a row were infinite or NaN",
    EXIT_WATCHDOG: "a rank hung, and the watchdog ended it",
    EXIT_REQUEUE: "stopped by Ctrl-C or SIGTERM, and saved: run it again to go on",
    EXIT_INTERRUPTED: "left at the second Ctrl-C, without saving",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where to write them ({FOLDER})")
    folder: Path = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        publish_file(folder / name, text)
    return 0


def pages() -> Mapping[str, str]:
    """The text of each page, by the name of its file."""
    commands = [command_named(name) for name in COMMANDS]
    return {"README.md": index(commands), **{f"{command.name}.md": page(command) for command in commands}}


def command_named(name: str) -> Command[Any]:
    module = importlib.import_module(f"cli.{name.removeprefix('transformerlm-').replace('-', '_')}")
    return module.COMMAND


def index(commands: Sequence[Command[Any]]) -> str:
    return _joined(
        NOTE,
        "# Commands",
        table("Command", "", [(f"[`{command.name}`]({command.name}.md)", command.summary) for command in commands]),
        "Each page has the command's flags and settings with their defaults and bounds. In the terminal, `--help` "
        "shows the common ones, `--explain TABLE` those of a table, `--print-config` all values and where they come "
        "from. How files and command line go together: [configuration](../configuration.md).",
    )


def page(command: Command[Any]) -> str:
    tables = fields(command.schema)
    return _joined(
        NOTE,
        f"# {command.name}",
        command.summary,
        "\n".join(["```bash", *(f"uv run {command.name} {example}".rstrip() for example in command.examples), "```"]),
        f"Without `--config` it uses [{command.default_config}.toml]({RESOURCES}/{command.default_config}.toml).",
        "## Flags",
        table("Flag", "", [(code(flag), _sentence(text)) for flag, text in flags(command)]),
        "## Settings",
        f"{' · '.join(f'[`[{name}]`](#{name})' for name in tables)}",
        "On the command line `TABLE.NAME=VALUE`, in a file `NAME = VALUE` below `[TABLE]`. A default holds where "
        "neither says otherwise.",
        *(part for name in tables for part in settings_of(command.schema, name)),
        "## Exit codes",
        table("Code", "", [(str(number), meaning) for number, meaning in exit_codes(command).items()]),
        "[All commands](README.md) · [Configuration](../configuration.md)",
    )


def settings_of(schema: type[BaseModel], name: str) -> Iterator[str]:
    """A table of the configuration; one after the other where it comes in several kinds."""
    yield f"### `[{name}]`"
    yield documentation(schema)[name]
    default = type(defaults(schema).get(name))
    known: dict[Row, str] = {}
    for kind in kinds(fields(schema)[name]):
        tag = tag_of(kind)
        if tag:
            yield kind_heading(name, tag, is_default=kind is default)
            yield " ".join((kind.__doc__ or "").split())
        rows = [
            (code(each.name), code(each.default), meaning(each)) for each in settings(kind) if not is_tag(each, tag)
        ]
        new, like = divided(rows, known)
        if new:
            yield table("Setting", "Default", "", new)
        for other, names in like.items():
            yield f"As for `{other}`: {', '.join(names)}."
        if tag:
            known |= {row: tag[1] for row in new}


def divided(rows: Sequence[Row], known: Mapping[Row, str]) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows to show, and the names of those that an earlier kind shows already, where these are many."""
    like: dict[str, list[str]] = {}
    for row in rows:
        if row in known:
            like.setdefault(known[row], []).append(row[0])
    like = {kind: names for kind, names in like.items() if len(names) >= FEW}
    return [row for row in rows if known.get(row) not in like], like


def kind_heading(name: str, tag: tuple[str, str], *, is_default: bool) -> str:
    choice = f'`"{tag[1]}"`' if f"{name}.{tag[0]}" in DERIVED else f'`{tag[0]} = "{tag[1]}"`'
    return f"#### {choice}{' (the default)' if is_default else ''}"


def is_tag(setting: Setting, tag: tuple[str, str] | None) -> bool:
    return tag is not None and setting.name == tag[0]


def meaning(setting: Setting) -> str:
    required = "" if setting.default else "**Required.** "
    return f"{required}*{_sentence(setting.takes)}* {setting.text}"


def exit_codes(command: Command[Any]) -> Mapping[int, str]:
    return dict(sorted((TRAINING_EXIT_CODES if issubclass(command.schema, Experiment) else EXIT_CODES).items()))


# -- Markdown ----------------------------------------------------------------------------------------------------------


def table(*parts: Any) -> str:
    """Headings, then the rows."""
    *headings, rows = parts
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    # GitHub divides the cells before it looks for code: a bar in a cell is escaped there too.
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _joined(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
