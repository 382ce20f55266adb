from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from config.layers import COMMAND_LINE, Leaf, leaves, merge, override_layer, plain, with_origin
from config.loading import load, shipped
from config.schemas import InferConfig, PipelineConfig, TrainConfig
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE, UserError

REQUIRED = ["tokenizer.path=t", "data.megatron_train_prefix=p"]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# -- precedence --------------------------------------------------------------------------------------------------------

SETTINGS = ("training.max_steps", "training.log_every", "optimizer.learning_rate", "run.seed")
some_settings = st.dictionaries(st.sampled_from(SETTINGS), st.integers(1, 99))


@given(some_settings, some_settings, some_settings, some_settings)
def test_command_line_beats_file_beats_extended_files_beat_defaults(
    first: dict[str, int], second: dict[str, int], own: dict[str, int], typed: dict[str, int]
) -> None:
    def toml(values: dict[str, int]) -> str:
        return "\n".join(f"{name} = {value}" for name, value in values.items())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "first.toml", toml(first))
        write(folder, "second.toml", toml(second))
        path = write(folder, "own.toml", f'extends = ["first.toml", "second.toml"]\n{toml(own)}')
        loaded = load(PipelineConfig, path, [f"{name}={value}" for name, value in typed.items()])
        default = PipelineConfig()
        for setting in SETTINGS:
            table, field = setting.split(".")
            expected, origin = getattr(getattr(default, table), field), None
            for values, source in (
                (first, "first.toml"),
                (second, "second.toml"),
                (own, "own.toml"),
                (typed, COMMAND_LINE),
            ):
                if setting in values:
                    expected, origin = values[setting], source
            assert getattr(getattr(loaded.config, table), field) == expected
            found = loaded.origins.get(setting)
            assert found == origin or found == str(folder / str(origin))


def test_extends_is_relative_to_its_file_and_recursive(tmp_path: Path) -> None:
    write(tmp_path, "base/root.toml", "[training]\nmax_steps = 1\nlog_every = 1\n")
    write(tmp_path, "base/middle.toml", 'extends = "root.toml"\n[training]\nlog_every = 2\n')
    path = write(tmp_path, "mine/top.toml", 'extends = "../base/middle.toml"\n[run]\nseed = 5\n')
    config = load(PipelineConfig, path).config
    assert (config.training.max_steps, config.training.log_every, config.run.seed) == (1, 2, 5)
    assert config.run.name == "top"


def test_two_files_may_extend_the_same_one(tmp_path: Path) -> None:
    write(tmp_path, "root.toml", "[training]\nmax_steps = 1\n")
    write(tmp_path, "a.toml", 'extends = "root.toml"\n[run]\nseed = 1\n')
    write(tmp_path, "b.toml", 'extends = "root.toml"\n')
    path = write(tmp_path, "top.toml", 'extends = ["a.toml", "b.toml"]')
    assert load(PipelineConfig, path).config.run.seed == 1


def test_a_cycle_is_refused_with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    write(tmp_path, "b.toml", 'extends = "a.toml"')
    with pytest.raises(UserError, match=r"a\.toml → b\.toml → a\.toml") as caught:
        load(PipelineConfig, "a.toml")
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("text", "words", "code"),
    [
        ('extends = "gone.toml"', "gone.toml, which .*own.toml extends", EXIT_FAILURE),
        ("extends = 3", "`extends` must be", EXIT_USAGE),
        ("[run", "not valid TOML: .*end of document", EXIT_USAGE),
        ("[run]\nseed = 1\nseed = 2", "not valid TOML", EXIT_USAGE),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, text: str, words: str, code: int) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(PipelineConfig, write(tmp_path, "own.toml", text))
    assert caught.value.exit_code == code


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no configuration file"):
        load(PipelineConfig, tmp_path / "gone.toml")
    with pytest.raises(UserError, match="cannot be read"):
        load(PipelineConfig, tmp_path)
    (tmp_path / "latin.toml").write_bytes('[run]\nname = "é"'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load(PipelineConfig, tmp_path / "latin.toml")


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf[run]\nseed = 3\n")
    assert load(PipelineConfig, tmp_path / "bom.toml").config.run.seed == 3


def test_the_run_is_named_after_the_file_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, "my experiment.v2.toml", "")
    assert load(PipelineConfig, path).config.run.name == "my experiment.v2"
    assert load(PipelineConfig, path, ["run.name=other"]).config.run.name == "other"
    assert load(PipelineConfig).config.run.name == "run"


def test_an_unknown_shipped_name_lists_the_names() -> None:
    for name in ("nope", "../schemas", ""):
        with pytest.raises(UserError, match=r"quickstart.*tinystories") as caught:
            shipped(name)
        assert caught.value.exit_code == EXIT_USAGE
    assert shipped("train") == shipped("train.toml")


# -- tables of several kinds -------------------------------------------------------------------------------------------


def test_a_table_of_another_kind_replaces_and_of_the_same_kind_merges(tmp_path: Path) -> None:
    path = write(tmp_path, "own.toml", '[schedule]\nkind = "wsd"\nwarmup_steps = 7\ndecay_fraction = 0.5\n')
    same = load(PipelineConfig, path, ["schedule.kind=wsd", "schedule.warmup_steps=8"]).config.schedule
    assert (same.kind, same.warmup_steps) == ("wsd", 8) and same.decay_fraction == 0.5
    other = load(PipelineConfig, path, ["schedule.kind=constant"]).config.schedule
    assert (other.kind, other.warmup_steps) == ("constant", 0)


def test_the_default_kind_counts_when_a_table_changes_it(tmp_path: Path) -> None:
    path = write(tmp_path, "own.toml", "[schedule]\nfinal_fraction = 0.3\n")
    assert load(PipelineConfig, path).config.schedule.final_fraction == 0.3  # pyright: ignore
    # `final_fraction` was the cosine's; `constant` has none, so merging would be an error
    assert load(PipelineConfig, path, ["schedule.kind=constant"]).config.schedule.kind == "constant"


@pytest.mark.parametrize("order", list(itertools.permutations(["schedule.kind=wsd", "schedule.decay_fraction=0.4"])))
def test_the_command_line_is_one_layer(order: tuple[str, ...]) -> None:
    assert load(PipelineConfig, None, order).config.schedule.decay_fraction == 0.4  # pyright: ignore


def test_a_corpus_of_files_takes_the_place_of_one_on_the_hub() -> None:
    overrides = ["corpus.kind=files", 'corpus.train_paths=["a.jsonl"]']
    corpus = load(PipelineConfig, shipped("tinystories"), overrides).config.corpus
    assert corpus.kind == "files" and corpus.train_paths == ("a.jsonl",) and corpus.max_train_documents == 0


def test_lists_replace(tmp_path: Path) -> None:
    path = write(tmp_path, "own.toml", '[inference]\nprompts = ["a", "b"]\n')
    assert load(PipelineConfig, path, ['inference.prompts=["c"]']).config.inference.prompts == ("c",)


json_values = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3), max_leaves=6
)
tables = st.dictionaries(st.sampled_from("abc"), json_values, max_size=3)


@given(tables, tables)
def test_a_value_survives_unless_the_upper_layer_has_one_at_above_or_below_its_path(
    low: dict[str, object], high: dict[str, object]
) -> None:
    below, above = dict(leaves(with_origin(low, "low"))), dict(leaves(with_origin(high, "high")))
    covered = {path for path in below if any(path[: len(other)] == other[: len(path)] for other in above)}
    expected = {path: leaf for path, leaf in below.items() if path not in covered} | above
    assert dict(leaves(merge(with_origin(low, "low"), with_origin(high, "high")))) == expected


# -- shorthands --------------------------------------------------------------------------------------------------------


def test_depth_means_layers_width_and_heads(tmp_path: Path) -> None:
    model = load(TrainConfig, None, [*REQUIRED, "model.depth=12"]).config.model
    assert (model.num_layers, model.d_model, model.num_heads, model.head_dim) == (12, 768, 12, 64)


def test_depth_is_overridden_by_and_overrides_other_layers(tmp_path: Path) -> None:
    explicit = write(tmp_path, "explicit.toml", "[model]\nnum_layers = 2\nd_model = 96\nnum_heads = 3\n")
    model = load(PipelineConfig, explicit, ["model.depth=5"]).config.model
    assert (model.num_layers, model.d_model, model.num_heads) == (5, 320, 5)
    short = write(tmp_path, "short.toml", "[model]\ndepth = 5\n")
    model = load(PipelineConfig, short, ["model.num_layers=2"]).config.model
    assert (model.num_layers, model.d_model) == (2, 320)
    heads = load(PipelineConfig, short, ["model.depth=4", "model.num_heads=8"]).config.model
    assert (heads.d_model, heads.num_heads) == (256, 8)


@pytest.mark.parametrize("other", ["model.num_layers=3", "model.d_model=256"])
def test_depth_beside_what_it_means_is_an_error(other: str) -> None:
    with pytest.raises(ValidationError) as caught:
        load(PipelineConfig, None, ["model.depth=3", other])
    assert caught.value.errors()[0]["loc"] == ("model", "depth")
    assert other.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "six"])
def test_depth_is_a_positive_whole_number(value: str) -> None:
    with pytest.raises(ValidationError, match="whole number"):
        load(PipelineConfig, None, [f"model.depth={value}"])


def test_the_objective_is_chosen_in_training() -> None:
    config = load(PipelineConfig, None, ["training.objective=ar", "objective.z_loss=0.5"]).config
    assert (config.objective.kind, config.objective.z_loss) == ("ar", 0.5)


# -- values of the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("1_000", 1000),
        ("4e-5", 4e-5),
        ("true", True),
        ("True", "True"),
        ('"5"', "5"),
        ("'a b'", "a b"),
        ("", ""),
        ("plain words", "plain words"),
        ("C:\\new", "C:\\new"),
        ("a=b", "a=b"),
        ("x # not a comment", "x # not a comment"),
        ("2024-01-01", "2024-01-01"),
        ("1\nother = 2", "1\nother = 2"),
        ('["a", "b"]', ["a", "b"]),
        ('[["a"], 1]', [["a"], 1]),
    ],
)
def test_values_are_toml_or_else_text(text: str, value: object) -> None:
    assert plain(override_layer([f"a.b={text}"])) == {"a": {"b": value}}


def test_an_inline_table_is_a_table() -> None:
    assert override_layer(["a={b = 1}", "a.c=2"]) == {
        "a": {"b": Leaf(1, COMMAND_LINE), "c": Leaf(2, COMMAND_LINE, "2")}
    }


def test_text_settings_take_numbers_as_typed() -> None:
    overrides = ["run.name=007", "corpus.kind=files", "corpus.train_paths=['x']", "corpus.text_field=1e3"]
    config = load(PipelineConfig, None, overrides).config
    assert config.run.name == "007"
    assert config.corpus.kind == "files" and config.corpus.text_field == "1e3"


def test_numbers_in_a_file_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="valid string"):
        load(PipelineConfig, write(tmp_path, "own.toml", "[run]\nname = 7\n"))


def test_the_last_assignment_wins() -> None:
    assert load(PipelineConfig, None, ["run.seed=1", "run.seed=2"]).config.run.seed == 2


@pytest.mark.parametrize("assignment", ["seed", "=1", "a b.c=1", "run..seed=1", ".seed=1", "run.=1"])
def test_what_is_no_assignment_is_refused(assignment: str) -> None:
    with pytest.raises(UserError, match="is not a setting") as caught:
        load(PipelineConfig, None, [assignment])
    assert caught.value.exit_code == EXIT_USAGE


def test_bytes_that_are_not_text_are_refused() -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        load(InferConfig, None, ["inference.prompt=\udcff"])
