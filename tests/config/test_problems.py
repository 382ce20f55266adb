from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from config.loading import load
from config.problems import lines
from config.schemas import EvalConfig, InferConfig, MakeDataConfig, PipelineConfig, TrainConfig
from config.spellings import SPELLINGS
from config.tables import fields, walk

REQUIRED = ["tokenizer.path=t", "data.megatron_train_prefix=p"]


def problem_lines(schema: type[BaseModel], *overrides: str) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        load(schema, None, overrides)
    return lines(caught.value)


def only(schema: type[BaseModel], *overrides: str) -> str:
    (line,) = problem_lines(schema, *overrides)
    return line


@pytest.mark.parametrize(
    ("written", "ours"),
    [
        # the names of the table "Names that several documents give one thing"
        ("model.max_seq_len=1", "model.context_length"),
        ("model.type=x", "model.kind"),
        ("model.name=x", "model.kind"),
        ("training.learning_rate=1", "optimizer.learning_rate"),
        ("output.dir=x", "run.dir"),
        # the right word in the wrong table
        ("training.seed=1", "run.seed"),
        ("model.max_steps=1", "training.max_steps"),
        ("max_steps=1", "training.max_steps"),
        # slips of the keyboard
        ("training.max_step=1", "training.max_steps"),
        ("training.max-steps=1", "training.max_steps"),
        ("optimizer.leraning_rate=1", "optimizer.learning_rate"),
        ("trainng.max_steps=1", "training"),
        # the words of other projects
        ("training.lr=1", "optimizer.learning_rate"),
        ("model.n_layer=1", "model.num_layers"),
        ("training.batch_size=1", "training.device_batch_size"),
        ("training.grad_clip=1", "training.gradient_clip"),
    ],
)
def test_an_unknown_name_suggests_ours(written: str, ours: str) -> None:
    line = only(TrainConfig, *REQUIRED, written)
    assert f"did you mean `{ours}`?" in line
    assert line.startswith(written.split(".")[0].split("=")[0])
    assert "command line" in line


def test_every_spelling_leads_to_a_setting_of_some_command() -> None:
    from config.schemas import COMMANDS

    known = {".".join(path) for schema in COMMANDS.values() for path, _ in walk(schema)}
    assert {ours for several in SPELLINGS.values() for ours in several} <= known


def test_vocabulary_size_is_the_tokenizers() -> None:
    assert "`tokenizer.vocab_size`" in only(PipelineConfig, "model.vocab_size=100")


def test_a_setting_of_another_kind_names_the_kinds_that_have_it() -> None:
    line = only(PipelineConfig, "schedule.kind=constant", "schedule.decay_fraction=0.5")
    assert line.startswith("schedule.decay_fraction: ") and 'schedule.kind = "wsd"' in line


def test_a_table_of_another_command_names_it() -> None:
    line = only(TrainConfig, *REQUIRED, "corpus.seed=1")
    assert line.startswith("corpus: ") and "transformerlm-pipeline" in line


def test_nothing_near_lists_what_there_is() -> None:
    assert "the settings of [checkpoint] are keep_last, keep_every" in only(PipelineConfig, "checkpoint.zzzzz=1")
    assert "the tables are run, model" in only(PipelineConfig, "zzzzz.yyyyy=1")


@pytest.mark.parametrize(
    ("written", "path", "words"),
    [
        ("training.max_steps=0", "training.max_steps", "greater than or equal to 1, not 0"),
        ("training.max_steps=many", "training.max_steps", "valid integer, not 'many'"),
        ("training.max_steps=1.5", "training.max_steps", "integer"),
        ("training.max_steps=true", "training.max_steps", "integer"),
        ("training.gradient_clip=nan", "training.gradient_clip", "finite"),
        ("training.compile=True", "training.compile", "true or false"),
        ("training.precision=fp61", "training.precision", 'did you mean "fp16"?'),
        ("schedule.kind=cosin", "schedule.kind", 'did you mean "cosine"?'),
        ("optimizer.kind=sgd", "optimizer.kind", 'must be one of "adamw", "muon"'),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps", "greater than or equal to 0"),
        ("schedule=7", "schedule", "is a table"),
        ("model=7", "model", "is a table"),
        ("inference.prompts=[1]", "inference.prompts[0]", "valid string"),
        ("inference.prompts=Once", "inference.prompts", "must be a list"),
        ("run.name=a/b", "run.name", "name of a folder"),
        ("run.name=..", "run.name", "name of a folder"),
        ("run.dir=", "run.dir", "must not be empty"),
        ("model.d_model=102", "model", "multiple of num_heads"),
    ],
)
def test_a_bad_value_has_its_path_without_union_tags(written: str, path: str, words: str) -> None:
    line = only(PipelineConfig, written)
    assert line.startswith(f"{path}: ") and words in line, line


def test_what_must_hold_between_tables() -> None:
    assert "must be a multiple of model.context_length (256), for instance 1024" in only(
        PipelineConfig, "training.total_batch_size=1000"
    )
    assert "at most model.context_length" in only(PipelineConfig, "inference.total_length=300")
    assert "at most model.context_length" in only(PipelineConfig, "evaluation.stride=300")
    assert "the pipeline makes its token files" in only(PipelineConfig, "data.megatron_val_prefix=x")
    assert "data.megatron_train_prefix is required" in only(TrainConfig, "tokenizer.path=t")


def test_what_is_missing_is_named() -> None:
    assert only(TrainConfig, "data.megatron_train_prefix=p").startswith("tokenizer.path: is required")
    assert "inference.checkpoint is required" in only(InferConfig)
    assert only(MakeDataConfig).startswith("tokenizer.path: is required")
    assert only(PipelineConfig, "corpus.kind=hub").startswith("corpus.dataset_name: is required")
    assert [line.split(":")[0] for line in problem_lines(EvalConfig, "data.kind=tokens")] == [
        "evaluation.checkpoint",
        "data.prefix",
    ]


def test_every_problem_has_a_line() -> None:
    wrong = ["training.max_steps=0", "model.max_seq_len=1", "schedule.kind=cos", "run.seed=-1", "optimizer.beta1=1.0"]
    assert len(problem_lines(PipelineConfig, *wrong)) == len(wrong)


def test_the_exception_keeps_paths_types_and_inputs() -> None:
    with pytest.raises(ValidationError) as caught:
        load(PipelineConfig, None, ["schedule.warmup_steps=-1", "model.nope={a = 1}"])
    by_path = {error["loc"]: error for error in caught.value.errors()}
    assert by_path["schedule", "warmup_steps"]["type"] == "greater_than_equal"
    assert by_path["schedule", "warmup_steps"]["input"] == -1
    assert by_path["model", "nope"]["type"] == "unexpected_keyword_argument"


def test_the_file_with_the_bad_value_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.toml").write_text("[training]\nmax_steps = 0\n")
    Path("top.toml").write_text('extends = "base.toml"\n[run]\nseeed = 1\n')
    with pytest.raises(ValidationError) as caught:
        load(PipelineConfig, "top.toml")
    first, second = sorted(lines(caught.value))
    assert first.startswith("run.seeed") and "(from top.toml)" in first
    assert second.startswith("training.max_steps") and "(from base.toml)" in second


def test_braces_in_values_are_no_templates() -> None:
    assert "{message}" in only(PipelineConfig, "training.precision={message}")


def test_validation_from_python_is_strict_too() -> None:
    with pytest.raises(ValidationError):
        PipelineConfig.model_validate({"training": {"max_steps": "5"}})
    with pytest.raises(ValidationError):
        PipelineConfig.model_validate({"training": {"nope": 5}})
    config = PipelineConfig()
    with pytest.raises(ValidationError):
        config.run = config.run  # pyright: ignore


def test_tables_and_their_fields_agree_with_the_schema() -> None:
    assert set(fields(PipelineConfig)) == set(PipelineConfig.model_fields)


def test_data_of_another_pipeline() -> None:
    needed = ("tokenizer.path=t", "data.megatron_train_prefix=p")
    assert 'belongs to data.pipeline_mode = "packed", data.pipeline_mode = "rows"' in only(
        TrainConfig, *needed, "data.text_field=x"
    )
    stream = ("tokenizer.path=t", "data.pipeline_mode=rows", "data.dataset_name=d")
    assert "`data.text_field`" in only(TrainConfig, *stream, "data.text_column=x")
    assert "data.lanes: must be one of 1, 2, 4, 8" in only(TrainConfig, *stream, "data.lanes=5")
    assert "`data.pipeline_mode`" in only(TrainConfig, *stream, "data.mode=packed")
    assert "must be a valid string, not 3" in only(TrainConfig, *stream, "data.validation_sets={ wiki = 3 }")


def test_a_list_says_how_it_is_written() -> None:
    message = only(PipelineConfig, "corpus.kind=files", "corpus.train_paths=a.txt")
    assert """write 'corpus.train_paths=["a.txt"]'""" in message
