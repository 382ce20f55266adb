"""A configuration as text: TOML with origins, JSON Schema, and an explanation of each setting for the terminal."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel

from config.layers import DEFAULT
from config.loading import Loaded, resolved
from config.tables import TAGS, defaults, documentation, fields, kinds, members, tag_of
from trainkit.errors import EXIT_USAGE, UserError

DERIVED = {"objective.kind"}
"""Settings that follow from another one: `training.objective` is where it is set."""

_COMMENT_COLUMN = 60


# -- TOML --------------------------------------------------------------------------------------------------------------


def to_toml(loaded: Loaded[Any]) -> str:
    """Every value, with where it comes from as a comment; reads back to the same configuration."""
    return "\n\n".join("\n".join(table) for table in _tables(resolved(loaded.config), loaded.origins)) + "\n"


def _tables(values: Mapping[str, Any], origins: Mapping[str, str], path: tuple[str, ...] = ()) -> Iterator[list[str]]:
    settings = {
        name: value
        for name, value in values.items()
        if not isinstance(value, dict) and ".".join((*path, name)) not in DERIVED
    }
    if path and (settings or not values):
        written = [f"{name} = {toml_value(value)}" for name, value in settings.items()]
        column = min(_COMMENT_COLUMN, max(map(len, written), default=0))
        comments = [origins.get(".".join((*path, name)), DEFAULT) for name in settings]
        yield [
            f"[{'.'.join(path)}]",
            *(f"{line:<{column}}  # {_one_line(comment)}" for line, comment in zip(written, comments, strict=True)),
        ]
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _tables(cast("dict[str, Any]", value), origins, (*path, name))


def toml_value(value: Any) -> str:
    """A JSON-able value in TOML's notation."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            # TOML's basic strings escape as JSON's do, but for the one control character that JSON leaves alone.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case int() | float():
            return repr(value)
        case list():
            return f"[{', '.join(toml_value(item) for item in cast('list[Any]', value))}]"
        case dict():
            items = [f"{toml_value(key)} = {toml_value(item)}" for key, item in cast("dict[str, Any]", value).items()]
            return f"{{ {', '.join(items)} }}" if items else "{}"
        case _:
            raise AssertionError(f"no configuration holds {value!r}")


def _one_line(origin: str) -> str:
    """File names may hold anything; a comment ends with its line."""
    return "".join(character if character.isprintable() else "?" for character in origin)


# -- JSON Schema -------------------------------------------------------------------------------------------------------


def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors: the specs' documentation and the shorthands included."""
    described = schema.model_json_schema()
    tables = {table.__name__: table for table in _all_tables(schema)}
    for name, definition in described.get("$defs", {}).items():
        _describe(definition, tables[name])
    _describe(described, schema)
    described["properties"]["extends"] = {
        "description": "Files to build on, relative to this one; what stands here wins.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    if "model" in fields(schema):
        for model in kinds(fields(schema)["model"]):
            described["$defs"][model.__name__]["properties"]["depth"] = {
                "description": "Short for `num_layers = depth`, `d_model = 64 * depth` and heads of 64 channels.",
                "type": "integer",
                "minimum": 1,
            }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def _describe(definition: dict[str, Any], table: type) -> None:
    definition["description"] = " ".join((table.__doc__ or "").split())
    for name, text in documentation(table).items():
        if name in definition.get("properties", {}):
            definition["properties"][name]["description"] = text


def _all_tables(table: type) -> Iterator[type]:
    for annotation in fields(table).values():
        for kind in kinds(annotation):
            yield kind
            yield from _all_tables(kind)


# -- explanations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What there is to say about a setting."""

    name: str
    """Without the table's."""
    default: str
    """In TOML's notation; empty where a value is required."""
    takes: str
    """`whole number, at least 1`."""
    text: str
    """Its documentation, in one line."""


def explain(schema: type[BaseModel], name: str = "", width: int = 100) -> str:
    """What a table (`training`) or a setting (`training.max_steps`) means; without a name, every table in one line."""
    if not name:
        documents = documentation(schema)
        return "\n".join(_entry(f"[{table}]", documents.get(table, ""), width) for table in fields(schema))
    table, _, setting = name.partition(".")
    annotation = fields(schema).get(table)
    if annotation is None:
        raise UserError(f"There is no table {table!r}; the tables are {', '.join(fields(schema))}.", EXIT_USAGE)
    paragraphs: list[str] = []
    for kind in kinds(annotation):
        entries = [_explained(table, found, width) for found in settings(kind) if setting in ("", found.name)]
        if entries:
            paragraphs.append("\n".join([_heading(table, kind), *entries]))
    if not paragraphs:
        names = sorted({field for kind in kinds(annotation) for field in fields(kind)})
        raise UserError(f"[{table}] has no setting {setting!r}; it has {', '.join(names)}.", EXIT_USAGE)
    return "\n\n".join(paragraphs)


def summaries(schema: type[BaseModel], names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """The named settings with the first sentence of their documentation."""
    for name in names:
        table, _, setting = name.partition(".")
        candidates = [kind for kind in kinds(fields(schema)[table]) if setting in fields(kind)]
        if setting in TAGS:
            values = [tag[1] for kind in candidates if (tag := tag_of(kind))]
            yield name, f"Which kind of table: {', '.join(values)}"
        else:
            text = documentation(candidates[0])[setting]
            yield name, text.split(". ")[0].split("; ")[0].rstrip(".")


def settings(kind: type) -> Iterator[Setting]:
    """The settings of one kind of a table, in order of declaration."""
    texts, values = documentation(kind), defaults(kind)
    for name, annotation in fields(kind).items():
        default = toml_value(_plain(values[name])) if name in values else ""
        yield Setting(name, default, type_name(annotation), texts.get(name, ""))


def _heading(table: str, kind: type) -> str:
    tag = tag_of(kind)
    choice = f' {tag[0]} = "{tag[1]}"' if tag else ""
    return f"[{table}]{choice}: {' '.join((kind.__doc__ or '').split())}"


def _explained(table: str, setting: Setting, width: int) -> str:
    head = f"{table}.{setting.name} = {setting.default or '(required)'}"
    return _entry(head, f"{setting.takes}. {setting.text}", width)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in cast("tuple[Any, ...]", value)] if isinstance(value, tuple) else value


def _entry(head: str, text: str, width: int) -> str:
    return f"  {head}\n{textwrap.fill(text, width, initial_indent='      ', subsequent_indent='      ')}"


def type_name(annotation: Any) -> str:
    """What a setting takes, in words: `whole number, at least 1`."""
    if get_origin(annotation) is Annotated:
        base, *limits = get_args(annotation)
        return ", ".join([type_name(base), *(word for limit in limits for word in _limit(limit))])
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(json.dumps(value) for value in get_args(annotation))}"
    if get_origin(annotation) in (tuple, list):
        return f"list of {type_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "table of names and texts"
    if len(members(annotation)) > 1:
        return " or ".join(type_name(member) for member in members(annotation))
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(annotation, "value")


def _limit(limit: Any) -> Iterator[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    yield from (
        f"{word} {getattr(limit, name)}" for name, word in words.items() if getattr(limit, name, None) is not None
    )
    if getattr(limit, "min_length", None):
        yield "not empty"
