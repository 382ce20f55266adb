"""What a schema's tables and settings are: the one place that looks inside the specs' annotations.

A *table* is a frozen dataclass (a spec), named by a key of the schema; a *setting* is a field of a table that is not a
table itself. Where a table comes in several kinds, a field named in `TAGS` tells them apart.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

TAGS = ("kind", "pipeline_mode")
"""Names of the settings that choose a table's kind."""


@cache
def fields(table: type) -> Mapping[str, Any]:
    """The fields of a schema or spec with their annotations, in order of declaration."""
    if issubclass(table, BaseModel):
        return {name: field.annotation for name, field in table.model_fields.items()}
    hints = get_type_hints(table, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(table)}


def defaults(table: type) -> dict[str, Any]:
    """The default value of each field that has one."""
    if issubclass(table, BaseModel):
        optional = {name: field for name, field in table.model_fields.items() if not field.is_required()}
        return {name: field.get_default(call_default_factory=True) for name, field in optional.items()}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(table):
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def kinds(annotation: Any) -> tuple[type, ...]:
    """The specs that an annotation stands for: several for a union, none for a plain setting."""
    return tuple(
        member for member in members(annotation) if isinstance(member, type) and dataclasses.is_dataclass(member)
    )


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, without `Annotated`; anything else is its own only alternative."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for argument in get_args(annotation) for inner in members(argument))
    return (annotation,)


def tag_of(table: type) -> tuple[str, str] | None:
    """The name and value of the tag that marks this kind of table, for instance `("kind", "cosine")`."""
    for name, annotation in fields(table).items():
        if name in TAGS and get_origin(annotation) is Literal:
            return name, get_args(annotation)[0]
    return None


def chosen_kind(annotation: Any, given: Any) -> type | None:
    """The spec that the given values (a plain dictionary) choose among those of an annotation."""
    candidates = kinds(annotation)
    if len(candidates) == 1:
        return candidates[0]
    for candidate in candidates:
        tag = tag_of(candidate)
        if tag and isinstance(given, dict) and given.get(tag[0]) == tag[1]:
            return candidate
    return None


def walk(table: type, given: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every setting with its annotation; where a table has several kinds, those of the given one, else of all."""
    for name, annotation in fields(table).items():
        inner = given.get(name) if isinstance(given, dict) else None
        chosen = chosen_kind(annotation, inner)
        below = (chosen,) if chosen else kinds(annotation)
        if not below:
            yield (*path, name), annotation
        for kind in below:
            yield from walk(kind, inner, (*path, name))


@cache
def documentation(table: type) -> Mapping[str, str]:
    """The string below each field, read from the source: only help and the JSON Schema need it."""
    import ast
    import inspect
    import textwrap

    texts: dict[str, str] = {}
    for owner in reversed(table.__mro__):
        if (
            owner is object
            or owner is BaseModel
            or not (dataclasses.is_dataclass(owner) or issubclass(owner, BaseModel))
        ):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    texts[name] = " ".join(words.split())
                case _:
                    pass
    return texts
