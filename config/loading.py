"""`load`: a validated configuration, and where each of its values comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from config import problems
from config.layers import DEFAULT, Leaf, Tree, file_layers, leaves, merge, nested, override_layer, plain
from config.tables import defaults, fields, kinds, tag_of
from trainkit.errors import EXIT_USAGE, UserError

Schema = TypeVar("Schema", bound=BaseModel)

HEAD_DIM = 64
"""Width of one attention head, and of the model for each layer, where `model.depth` says how large a model is."""


@dataclass(frozen=True)
class Loaded(Generic[Schema]):
    """A configuration and its story."""

    config: Schema
    origins: Mapping[str, str]
    """Where each value comes from, by dotted path: a file, a flag, or `command line`. What is not here is a default."""
    source: Path | None
    """The file that was loaded, where there was one."""


def load(
    schema: type[Schema],
    source: Path | str | None = None,
    overrides: Iterable[str] = (),
    *,
    layers: Iterable[Tree] = (),
) -> Loaded[Schema]:
    """Read `source` (TOML), put `layers` and `overrides` (`"table.key=value"`) over it and validate.

    Raises `pydantic.ValidationError` for settings that are missing, unknown or wrong, with the path of each, and
    `UserError` for a file that is missing or is not TOML. Files that the configuration names are not looked at.
    """
    path = Path(source) if source is not None else None
    tree = _default_layer(schema, path)
    for layer in [*(file_layers(path) if path else []), *layers, override_layer(overrides)]:
        tree = merge(tree, _expand(layer, schema))
    config = _validate(schema, tree)
    origins = {".".join(keys): leaf.origin for keys, leaf in leaves(tree) if leaf.origin != DEFAULT}
    return Loaded(config, origins, path)


def shipped(name: str) -> Path:
    """The path of a configuration that comes with the project, by its name without `.toml`."""
    folder = Path(str(resources.files("config"))) / "resources"
    path = folder / f"{name.removesuffix('.toml')}.toml"
    if path.parent != folder or not path.is_file():
        names = ", ".join(shipped_names())
        raise UserError(f"There is no shipped configuration named {name!r}; the names are {names}.", EXIT_USAGE)
    return path


def shipped_names() -> list[str]:
    return sorted(path.stem for path in (Path(str(resources.files("config"))) / "resources").glob("*.toml"))


def _default_layer(schema: type[BaseModel], path: Path | None) -> Tree:
    """What must be known before the first file: each table's default kind, and a run named after the file."""
    layer = _default_kinds(schema)
    run = layer.get("run")
    if path is not None and isinstance(run, dict):
        run["name"] = Leaf(path.stem, DEFAULT)
    return layer


def _default_kinds(table: type) -> Tree:
    """Every table with the tag of its default kind. A union without a default stays out: its kind must be given."""
    layer: Tree = {}
    values = defaults(table)
    for name, annotation in fields(table).items():
        candidates = kinds(annotation)
        if name in values and candidates:
            candidates = (type(values[name]),)
        if len(candidates) == 1:
            tag = tag_of(candidates[0])
            layer[name] = {**({tag[0]: Leaf(tag[1], DEFAULT)} if tag else {}), **_default_kinds(candidates[0])}
    return layer


def _expand(layer: Tree, schema: type[BaseModel]) -> Tree:
    """Write out the shorthands where they stand, so that a later layer can still override what they mean."""
    if "model" in fields(schema):
        layer = _expand_depth(layer, schema)
    if "objective" in fields(schema):
        layer = _expand_objective(layer)
    return layer


def _expand_depth(layer: Tree, schema: type[BaseModel]) -> Tree:
    """`model.depth = N`: N layers, a model 64·N wide, heads of 64 channels."""
    model = layer.get("model")
    depth = model.get("depth") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(depth, Leaf):
        return layer
    path = ("model", "depth")
    if not isinstance(depth.value, int) or isinstance(depth.value, bool) or depth.value < 1:
        raise problems.single(schema, path, depth, f"must be a whole number of at least 1, not {depth.value!r}")
    if clashing := [name for name in ("num_layers", "d_model") if name in model]:
        names = " and ".join(f"`model.{name}`" for name in clashing)
        raise problems.single(schema, path, depth, f"stands for num_layers and d_model: leave it out, or {names}")
    meaning = {"num_layers": depth.value, "d_model": HEAD_DIM * depth.value, "num_heads": depth.value}
    written: Tree = {name: Leaf(value, depth.origin) for name, value in meaning.items()}
    return {**layer, "model": {**written, **{name: value for name, value in model.items() if name != "depth"}}}


def _expand_objective(layer: Tree) -> Tree:
    """`training.objective` is the kind of `[objective]`, so that a change of objective replaces that table."""
    training, objective = layer.get("training"), layer.get("objective", {})
    chosen = training.get("objective") if isinstance(training, dict) else None
    if chosen is None or not isinstance(objective, dict):
        return layer
    return {**layer, "objective": {"kind": chosen, **objective}}


def _validate(schema: type[Schema], tree: Tree) -> Schema:
    try:
        return _parse(schema, tree)
    except ValidationError as error:
        as_typed = _texts_as_typed(schema, tree, error)
        try:
            return _parse(schema, as_typed)
        except ValidationError as second:
            raise problems.explained(second, schema, as_typed) from None


def _parse(schema: type[Schema], tree: Tree) -> Schema:
    # As JSON, because TOML has its types: strict validation of Python values would refuse a list for a tuple.
    return schema.model_validate_json(json.dumps(plain(tree), default=str))


def _texts_as_typed(schema: type[BaseModel], tree: Tree, error: ValidationError) -> Tree:
    """`run.name=7` on the command line reads as the number 7: where text is wanted, it is the text `7`."""
    given = plain(tree)
    wanted = {
        problems.locate(problem["loc"], schema, given)[0]
        for problem in error.errors()
        if problem["type"] == "string_type"
    }
    for path, leaf in leaves(tree):
        if leaf.text is not None and path in wanted:
            tree = merge(tree, nested(path[:-1], {path[-1]: Leaf(leaf.text, leaf.origin)}))
    return tree


def resolved(config: BaseModel) -> dict[str, Any]:
    """Every value as plain JSON-able data, defaults included."""
    return config.model_dump(mode="json")
