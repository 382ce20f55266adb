from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import tomli
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from config.loading import Loaded, load, resolved, shipped, shipped_names
from config.rendering import explain, json_schema, to_toml, toml_value
from config.schemas import COMMANDS, SET_NAME, PipelineConfig, TrainConfig
from config.specs import FileName
from config.tables import kinds, walk
from trainkit.errors import UserError

SCHEMAS: dict[str, type[BaseModel]] = {
    "train": TrainConfig,
    "train_packed": TrainConfig,
    "train_text": TrainConfig,
    "train_diffusion": TrainConfig,
    "train_dual": TrainConfig,
    "quickstart": PipelineConfig,
    "quickstart_diffusion": PipelineConfig,
    "quickstart_dual": PipelineConfig,
    "corpus_long": PipelineConfig,
    "tinystories": PipelineConfig,
    "m3_medium": PipelineConfig,
    "runpod_1b": PipelineConfig,
    "runpod_2b": PipelineConfig,
    "runpod_4b": PipelineConfig,
    "baseline_transformer": TrainConfig,
    "diffusion_transformer": TrainConfig,
    "local": PipelineConfig,
    "train_tokenizer": COMMANDS["transformerlm-train-tokenizer"],
    "make_data": COMMANDS["transformerlm-make-data"],
    "simplestories": COMMANDS["transformerlm-train"],
    "infer": COMMANDS["transformerlm-infer"],
    "eval": COMMANDS["transformerlm-eval"],
    "bench_tokenizer": COMMANDS["transformerlm-bench-tokenizer"],
    "bench_infer": COMMANDS["transformerlm-bench-infer"],
    "replay": COMMANDS["transformerlm-replay"],
    "diff_runs": COMMANDS["transformerlm-diff-runs"],
}
SHIPPED = sorted(SCHEMAS)


def read_back(schema: type[BaseModel], text: str) -> Loaded[Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "other name.toml"
        path.write_text(text, encoding="utf-8")
        return load(schema, path)


def test_every_shipped_configuration_is_tested_here() -> None:
    assert shipped_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_print_and_read_back(name: str) -> None:
    loaded = load(SCHEMAS[name], shipped(name))
    again = read_back(SCHEMAS[name], to_toml(loaded))
    assert again.config == loaded.config
    assert tomli.loads(to_toml(again)) == tomli.loads(to_toml(loaded))


def some_value(annotation: Any) -> st.SearchStrategy[Any]:
    if get_origin(annotation) is dict:
        return st.dictionaries(st.from_regex(SET_NAME, fullmatch=True), st.text(), max_size=3)
    if get_origin(annotation) is tuple:
        return st.lists(some_value(get_args(annotation)[0]), max_size=3)
    if annotation == FileName:  # hypothesis does not know patterns
        return st.text(st.characters(exclude_categories=["C"], exclude_characters="/\\."), min_size=1)
    return st.from_type(annotation)


def as_tuples(value: Any) -> Any:
    """A list of TOML as a configuration holds it."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


@given(st.data())
def test_any_values_print_and_read_back(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(SHIPPED))
    schema = SCHEMAS[name]
    base = load(schema, shipped(name))
    settings = dict(walk(schema, resolved(base.config)))
    # a tag changes which settings there are, and lengths must agree between tables
    free = sorted(path for path in settings if path[-1] not in ("kind", "pipeline_mode") and path[0] != "model")
    chosen = data.draw(st.lists(st.sampled_from(free), max_size=6, unique=True))
    values = {path: data.draw(some_value(settings[path])) for path in chosen}
    try:
        loaded = load(
            schema, shipped(name), [f"{'.'.join(path)}={toml_value(value)}" for path, value in values.items()]
        )
    except ValidationError:
        assume(False)
        raise
    for (table, field), value in values.items():
        found = getattr(getattr(loaded.config, table), field)
        assert found == as_tuples(value)
        names = [f"{table}.{field}.{key}" for key in value] if isinstance(value, dict) else [f"{table}.{field}"]
        assert all(loaded.origins[name] == "command line" for name in names)
    again = read_back(schema, to_toml(loaded))
    assert again.config == loaded.config


any_value = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(any_value)
def test_values_in_toml_read_back(value: Any) -> None:
    assert tomli.loads(f"value = {toml_value(value)}  # comment") == {"value": value}


def test_each_value_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.toml").write_text("[training]\nmax_steps = 5\nlog_every = 5\n")
    Path("own.toml").write_text('extends = "base.toml"\n[training]\nlog_every = 6\n')
    printed = to_toml(load(PipelineConfig, "own.toml", ["run.seed=3"])).splitlines()
    comments = {line.split(" = ")[0]: line.rpartition("  # ")[2] for line in printed if " = " in line}
    assert comments["max_steps"] == "base.toml"
    assert comments["log_every"] == "own.toml"
    assert comments["keep_last"] == "default"
    assert 'name = "own"' in "\n".join(printed)


def test_a_strange_file_name_stays_inside_its_comment(tmp_path: Path) -> None:
    path = tmp_path / "two\nlines.toml"
    path.write_text("[run]\nname = 'x'\nseed = 9\n")
    loaded = load(PipelineConfig, path)
    assert read_back(PipelineConfig, to_toml(loaded)).config == loaded.config


def test_the_pipeline_writes_a_configuration_that_train_reads() -> None:
    pipeline = load(PipelineConfig, shipped("quickstart"), ["data.prefetch=0"]).config
    train = pipeline.train_config(tokenizer_path="tok", train_prefix="a/train", val_prefix="a/val")
    assert train.data.prefetch == 0
    assert read_back(TrainConfig, to_toml(Loaded(train, {}, None))).config == train


# -- schema and explanations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_json_schema_describes_every_setting(command: str) -> None:
    exported = json_schema(COMMANDS[command])
    assert json.loads(json.dumps(exported)) == exported
    for definition in (exported, *exported["$defs"].values()):
        assert definition["additionalProperties"] is False
        for name, member in definition["properties"].items():
            assert name in ("kind", "pipeline_mode") or member.get("description"), name


def test_the_json_schema_knows_the_shorthands() -> None:
    exported = json_schema(PipelineConfig)
    assert "extends" in exported["properties"]
    assert "depth" in exported["$defs"]["TransformerSpec"]["properties"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_setting_is_explained(command: str) -> None:
    schema = COMMANDS[command]
    for path, annotation in walk(schema):
        assert not kinds(annotation)
        text = explain(schema, ".".join(path))
        assert ".".join(path) in text and len(text.splitlines()) >= 3
    assert all(f"[{table}]" in explain(schema) for table in schema.model_fields)


def test_an_unknown_name_is_not_explained() -> None:
    with pytest.raises(UserError, match="the tables are run"):
        explain(PipelineConfig, "nope")
    with pytest.raises(UserError, match=r"\[training\] has no setting 'nope'"):
        explain(PipelineConfig, "training.nope")
