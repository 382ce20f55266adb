"""What is wrong with a configuration, said so that the next attempt succeeds.

Pydantic finds the problems; here each gets the path that the user wrote (without the tags that Pydantic puts between a
table of several kinds and its settings), the origin of the value and, for an unknown name, the nearest valid one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from config.layers import DEFAULT, Leaf, Tree, leaves, plain
from config.schemas import COMMANDS
from config.spellings import SPELLINGS
from config.tables import chosen_kind, fields, kinds, members, tag_of, walk

Path = tuple[str | int, ...]

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


def lines(error: ValidationError) -> list[str]:
    """One line for each problem: its path and what is wrong."""
    return [
        f"{dotted(problem['loc'])}: {problem['msg']}" if problem["loc"] else problem["msg"]
        for problem in error.errors(include_url=False, include_context=False)
    ]


def dotted(path: Path) -> str:
    """`("inference", "prompts", 0)` as `inference.prompts[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def single(schema: type[BaseModel], path: Path, leaf: Leaf, message: str) -> ValidationError:
    """A problem found before Pydantic sees the values."""
    return _rebuilt(schema, [("value_error", path, leaf.value, message + _source(leaf))])


def explained(error: ValidationError, schema: type[BaseModel], tree: Tree) -> ValidationError:
    """The same problems with the paths and words of this project."""
    given = plain(tree)
    by_path: dict[Path, tuple[str, Path, Any, str]] = {}
    for problem in error.errors(include_url=False):
        path, table, annotation = locate(problem["loc"], schema, given)
        for kind, inner, value, message in _explain(problem, path, table, annotation, schema, tree):
            if inner in by_path:  # one line per setting: the alternatives of a union fail one by one
                before = by_path[inner][3]
                message = before if message in before else f"{before}, or {message}"
            by_path[inner] = (kind, inner, value, message)
    described = [
        (kind, path, value, message + _source(_leaf_at(tree, path))) for kind, path, value, message in by_path.values()
    ]
    return _rebuilt(schema, described)


def _rebuilt(schema: type[BaseModel], problems: Iterable[tuple[str, Path, Any, str]]) -> ValidationError:
    # The message goes in as a value: braces in it must not be read as a template.
    details: list[InitErrorDetails] = [
        {"type": PydanticCustomError(kind, "{message}", {"message": message}), "loc": path, "input": value}  # pyright: ignore[reportArgumentType]
        for kind, path, value, message in problems
    ]
    return ValidationError.from_exception_data(schema.__name__, details)


def locate(location: Path, schema: type, given: Any) -> tuple[Path, type | None, Any]:
    """The path as the user wrote it, the table that it ends in, and the annotation of what it names, if it is known."""
    path: list[str | int] = []
    table: type | None = schema
    annotation: Any = schema
    parts = list(location)
    while parts:
        part = parts.pop(0)
        if table is None:  # inside a setting: positions and names count, those of union members do not
            path += [part] if isinstance(part, int) or get_origin(annotation) is dict else []
            continue
        path.append(part)
        annotation = fields(table).get(str(part))
        if annotation is None:
            return tuple(path), table, None
        given = given.get(part) if isinstance(given, dict) else None
        candidates = kinds(annotation)
        if not candidates:
            owner, table = table, None
            if not parts:
                return tuple(path), owner, annotation
            continue
        table = chosen_kind(annotation, given)
        if len(candidates) > 1 and parts and table is not None and parts[0] == _tag_value(table):
            parts.pop(0)
    return tuple(path), table, annotation


def _explain(
    problem: ErrorDetails, path: Path, table: type | None, annotation: Any, schema: type[BaseModel], tree: Tree
) -> Iterator[tuple[str, Path, Any, str]]:
    kind, value = problem["type"], problem["input"]
    context: Mapping[str, Any] = problem.get("ctx", {})
    if kind in UNKNOWN:
        yield from _unknown(kind, path, value, table, schema, tree)
    elif kind in MISSING:
        yield kind, path, None, f"is required, and nothing sets it: write {dotted(path)}=… or put it in the file"
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = str(context["discriminator"]).strip("'")
        allowed = [_tag_value(member) for member in kinds(annotation)]
        yield kind, (*path, tag), value, _choice(allowed, value.get(tag) if isinstance(value, dict) else None)
    elif kind == "literal_error":
        yield kind, path, value, _choice(_literal_values(annotation), value)
    elif (
        kind == "bool_type" and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off")
    ):
        yield kind, path, value, f"must be true or false (in small letters), not {value!r}"
    elif kind in ("list_type", "tuple_type"):
        example = json.dumps([value]) if isinstance(value, str | int | float) else '["a", "b"]'
        yield kind, path, value, f"must be a list{_given(value)}: on the command line write '{dotted(path)}={example}'"
    elif kind == "string_too_short":
        yield kind, path, value, "must not be empty"
    elif kind == "string_pattern_mismatch":
        yield kind, path, value, f"must be usable as the name of a folder: no slash, no dot in front; not {value!r}"
    elif kind == "value_error":
        yield kind, path, value, str(context.get("error", problem["msg"]))
    elif kind in ("dataclass_type", "model_type", "model_attributes_type", "dict_type"):
        yield kind, path, value, f"is a table and has settings of its own, such as {_example(annotation, path)}"
    else:
        yield kind, path, value, f"{problem['msg'].replace('Input should be', 'must be')}{_given(value)}"


def _given(value: Any) -> str:
    return f", not {value!r}" if isinstance(value, str | int | float) else ""


def _choice(allowed: Sequence[str | int], value: Any) -> str:
    names = ", ".join(json.dumps(name) for name in allowed)
    near = difflib.get_close_matches(str(value), [name for name in allowed if isinstance(name, str)], n=1)
    guess = f'; did you mean "{near[0]}"?' if near else ""
    return f"must be {'one of ' if len(allowed) > 1 else ''}{names}{_given(value)}{guess}"


def _literal_values(annotation: Any) -> list[str | int]:
    from typing import Literal, get_args

    literals = [member for member in members(annotation) if get_origin(member) is Literal]
    return [value for literal in literals for value in get_args(literal)]


def _example(annotation: Any, path: Path) -> str:
    table = kinds(annotation)[0]
    return f"`{dotted((*path, next(iter(fields(table)))))}`"


# -- unknown names -----------------------------------------------------------------------------------------------------


def _unknown(
    kind: str, path: Path, value: Any, table: type | None, schema: type[BaseModel], tree: Tree
) -> Iterator[tuple[str, Path, Any, str]]:
    names = {".".join(setting): setting for setting, _ in walk(schema, plain(tree))}
    if len(path) == 1 and isinstance(value, dict):
        yield from _unknown_table(kind, path, value, names, schema, tree)
    elif others := _other_kinds(path, table, schema):
        yield kind, path, value, f"no setting of this kind of table; it belongs to {others}"
    else:
        yield kind, path, value, f"no such setting{_suggestion(path, names, schema)}"


def _unknown_table(
    kind: str, path: Path, value: Any, names: Mapping[str, tuple[str, ...]], schema: type[BaseModel], tree: Tree
) -> Iterator[tuple[str, Path, Any, str]]:
    if near := difflib.get_close_matches(str(path[0]), list(fields(schema)), n=1):
        yield kind, path, value, f"no such table; did you mean `{near[0]}`?"
        return
    inside = [((*path, *inner), leaf) for inner, leaf in leaves(_subtree(tree, path))]
    owners = [command for command, other in COMMANDS.items() if path[0] in fields(other)]
    if owners and not any(dotted(full) in SPELLINGS for full, _ in inside):
        yield kind, path, value, f"no table of this command; it belongs to {', '.join(owners)}"
        return
    for full, leaf in inside:
        yield kind, full, leaf.value, f"no such setting{_suggestion(full, names, schema)}"


def _suggestion(path: Path, names: Mapping[str, tuple[str, ...]], schema: type[BaseModel]) -> str:
    """The nearest valid name: another project's spelling, the same word elsewhere, a similar word here, or anywhere."""
    written, word = dotted(path), str(path[-1])
    siblings = {name: setting[-1] for name, setting in names.items() if setting[:-1] == path[:-1]}
    same_word = [name for name, setting in names.items() if setting[-1] == word]
    for guess in (
        *(name for theirs in (written, word) for name in SPELLINGS.get(theirs, ()) if name in names),
        *(same_word if len(same_word) == 1 else ()),
        *_similar(word, siblings),
        *(same_word[:1]),
    ):
        return f"; did you mean `{guess}`?"
    tables = list(fields(schema))
    if len(path) == 1:
        near = difflib.get_close_matches(word, tables, n=1)
        return f"; did you mean `{near[0]}`?" if near else f"; the tables are {', '.join(tables)}"
    if guess := _similar(word, {name: setting[-1] for name, setting in names.items()}, cutoff=0.75):
        return f"; did you mean `{guess[0]}`?"
    if siblings:
        return f"; the settings of [{dotted(path[:-1])}] are {', '.join(siblings.values())}"
    return f"; the tables are {', '.join(tables)}"


def _similar(word: str, names: Mapping[str, str], cutoff: float = 0.6) -> list[str]:
    near = difflib.get_close_matches(word.replace("-", "_"), list(names.values()), n=1, cutoff=cutoff)
    return [name for name, last in names.items() if near and last == near[0]][:1]


def _other_kinds(path: Path, table: type | None, schema: type[BaseModel]) -> str:
    """The kinds of the same table that do have this setting."""
    annotation = fields(schema).get(str(path[0]))
    candidates = kinds(annotation) if len(path) == 2 else ()
    owners = [kind for kind in candidates if kind is not table and path[1] in fields(kind)]
    tags = [tag for kind in owners if (tag := tag_of(kind))]
    return ", ".join(f'{path[0]}.{name} = "{value}"' for name, value in tags)


def _tag_value(table: type) -> str:
    tag = tag_of(table)
    return tag[1] if tag else ""


# -- origins -----------------------------------------------------------------------------------------------------------


def _source(leaf: Leaf | None) -> str:
    return f" (from {leaf.origin})" if leaf is not None and leaf.origin != DEFAULT else ""


def _subtree(tree: Tree, path: Path) -> Tree:
    node: Tree | Leaf = tree
    for part in path:
        node = node.get(str(part), {}) if isinstance(node, dict) else {}
    return node if isinstance(node, dict) else {}


def _leaf_at(tree: Tree, path: Path) -> Leaf | None:
    """The leaf at a path, or the first one below it."""
    node: Tree | Leaf | None = tree
    for part in path:
        if isinstance(node, Leaf):  # a position inside a list
            return node
        node = node.get(str(part)) if node is not None else None
    if isinstance(node, dict):
        origins = {leaf.origin: leaf for _, leaf in leaves(node) if leaf.origin != DEFAULT}
        return next(iter(origins.values())) if len(origins) == 1 else None
    return node
