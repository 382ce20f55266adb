"""From files and command line to one tree of values that know where they come from.

Each source becomes a *layer*: nested dictionaries whose leaves carry their origin. Layers are stacked with `merge`:
defaults, then the files named by `extends`, then the file, then the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import tomli

from config.tables import TAGS
from trainkit.errors import EXIT_USAGE, UserError

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Leaf:
    """A value that is not a table."""

    value: Any
    origin: str
    text: str | None = None
    """What was typed, for a value of the command line: a setting that holds text takes it as it stands."""


Tree: TypeAlias = "dict[str, Tree | Leaf]"


def merge(lower: Tree, upper: Tree) -> Tree:
    """`upper` over `lower`: tables merge, lists and values replace, and so does a table of another kind."""
    if any(_changes(lower, upper, tag) for tag in TAGS):
        return upper
    merged = dict(lower)
    for key, value in upper.items():
        below = lower.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _changes(lower: Tree, upper: Tree, tag: str) -> bool:
    before, after = lower.get(tag), upper.get(tag)
    return isinstance(before, Leaf) and isinstance(after, Leaf) and before.value != after.value


def plain(tree: Tree) -> dict[str, Any]:
    """The values alone."""
    return {key: plain(value) if isinstance(value, dict) else value.value for key, value in tree.items()}


def leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Leaf]]:
    """Every leaf with its path."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def with_origin(values: dict[str, Any], origin: str, text: str | None = None) -> Tree:
    """A layer from plain nested dictionaries."""
    return {
        key: with_origin(cast("dict[str, Any]", value), origin)
        if isinstance(value, dict)
        else Leaf(value, origin, text)
        for key, value in values.items()
    }


def nested(tables: Iterable[str], layer: Tree) -> Tree:
    """A layer moved below the given tables."""
    for table in reversed(list(tables)):
        layer = {table: layer}
    return layer


# -- files -------------------------------------------------------------------------------------------------------------


def file_layers(path: Path, opened: tuple[Path, ...] = ()) -> list[Tree]:
    """The layers of a file, lowest first: those of the files that it extends, then its own."""
    resolved = path.resolve()
    if resolved in opened:
        chain = " → ".join(shown(file) for file in (*opened[opened.index(resolved) :], resolved))
        raise UserError(f"The configuration extends itself: {chain}; remove one `extends`.", EXIT_USAGE)
    values = _read(path, wanted_by=opened[-1] if opened else None)
    layers: list[Tree] = []
    for base in _bases(values.pop("extends", []), path):
        layers += file_layers(path.parent / base, (*opened, resolved))
    return [*layers, with_origin(values, shown(path))]


def _bases(extends: Any, path: Path) -> list[str]:
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"In {shown(path)}, `extends` must be the path of a file, or a list of paths.", EXIT_USAGE)
    return cast("list[str]", names)


def _read(path: Path, wanted_by: Path | None) -> dict[str, Any]:
    try:
        return tomli.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        named = f", which {shown(wanted_by)} extends (paths are relative to that file)" if wanted_by else ""
        raise UserError(f"There is no configuration file {shown(path)}{named}.") from None
    except OSError as error:
        raise UserError(f"The configuration file {shown(path)} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The configuration file {shown(path)} is not UTF-8 text.", EXIT_USAGE) from None
    except tomli.TOMLDecodeError as error:
        raise UserError(f"The configuration file {shown(path)} is not valid TOML: {error}.", EXIT_USAGE) from None


def shown(path: Path) -> str:
    """A path as a person wants to read it: relative where it lies below the current folder."""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


# -- command line ------------------------------------------------------------------------------------------------------

_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def override_layer(assignments: Iterable[str]) -> Tree:
    """One layer from `table.key=value` texts; a later one wins over an earlier one."""
    layer: Tree = {}
    for assignment in assignments:
        layer = merge(layer, _override(assignment))
    return layer


def _override(assignment: str) -> Tree:
    key, equals, text = assignment.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise UserError(
            f"`{assignment}` is not a setting: write table.key=value, as in training.max_steps=100.", EXIT_USAGE
        )
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"The value of `{key}` on the command line is not UTF-8 text.", EXIT_USAGE)
    *tables, name = key.split(".")
    return nested(tables, with_origin({name: _value(text)}, COMMAND_LINE, text))


def _value(text: str) -> Any:
    """A value as TOML reads it; what is not TOML is a string, and so is a date, which no setting takes."""
    try:
        document = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    if set(document) != {"value"} or not isinstance(document["value"], bool | int | float | str | list | dict):
        return text
    return document["value"]
