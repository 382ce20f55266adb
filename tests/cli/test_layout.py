"""What the flags of the pipeline stand for, and what it refuses before its first stage."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from cli import layout, pipeline
from scripts import shard_dataset
from trainkit.artifacts import MANIFEST, seal_directory
from trainkit.data.text_shards import KIND

Printed = dict[str, dict[str, object]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(layout.ROOT_VARIABLE, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    def run(*arguments: str) -> Printed:
        assert pipeline.main([*arguments, "--print-config"]) == 0, capsys.readouterr().err
        return tomli.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said where a command does nothing."""

    def run(*arguments: str, code: int = 1) -> str:
        assert pipeline.main(list(arguments)) == code
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("transformerlm-pipeline: "), error
        assert not Path("runs").exists() and not Path("artifacts").exists()
        return error

    return run


def write_shards(root: Path, *, zipped: bool = False, format: str = "lines") -> Path:
    """40 documents in shards of five, about half of them to validate with; the folder of those to train on."""
    text = root / "source.jsonl"
    text.write_text("".join(json.dumps({"text": f"tale number {i} of a mouse"}) + "\n" for i in range(40)))
    settings = shard_dataset.Settings(
        dataset=str(text), config="", revision="", split="train", text_field="text", format=format,
        gzip=zipped, val_fraction=0.5, seed=0, max_rows=0, max_lines=5,
    )  # fmt: skip
    shard_dataset.shard(settings, root / "datasets", "tales", workers=1, say=lambda line: None)
    return root / "datasets" / "train" / "tales"


# -- flags to settings


def test_the_local_smoke_test_as_it_is_documented(printed: Callable[..., Printed]) -> None:
    config = printed("--profile", "local", "--input", "data/input.txt", "--run-dir", "runs/local-smoke")
    assert config["run"]["dir"] == "runs" and config["run"]["name"] == "local-smoke"
    assert config["corpus"]["kind"] == "files" and config["corpus"]["train_paths"] == ["data/input.txt"]
    assert config["corpus"]["validation_fraction"] == 0.1, "the profile's own"
    assert config["artifacts"] | {"dtype": "auto"} == {
        "dir": "artifacts/local-smoke",
        "tokenizer_dir": "artifacts/tokenizer/local-smoke",
        "tokens_dir": "artifacts/tokens/local-smoke",
        "dtype": "auto",
    }


def test_flags_are_the_origin_of_what_they_set(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--profile", "local", "--input", "a.txt", "--run-dir", "runs/x", "--tokenizer-json", "t.json"]
    assert pipeline.main([*flags, "training.max_steps=3", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    origins = {line.split(" = ")[0]: line.rpartition("  # ")[2] for line in lines if " = " in line}
    assert origins["train_paths"] == "--input" and origins["path"] == "--tokenizer-json"
    assert origins["max_steps"] == "command line" and origins["allow_smaller"].endswith("local.toml")
    assert 'name = "x"' in lines[[line.startswith("[run]") for line in lines].index(True) + 1]


def test_without_the_flags_nothing_moves(printed: Callable[..., Printed]) -> None:
    assert printed("--profile", "quickstart") == printed("--config-name", "quickstart") == printed()


def test_all_of_the_cloud_lies_below_one_root(
    printed: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    cloud = ["--mode", "cloud", "--profile", "local", "--input", "/workspace/datasets/train/fineweb"]
    for variable, flags, root in (
        ("", [], "/workspace"),
        (str(place / "volume"), [], str(place / "volume")),
        (str(place / "volume"), ["--root", "/mnt"], "/mnt"),
    ):
        monkeypatch.setenv(layout.ROOT_VARIABLE, variable)
        config = printed(*cloud, *flags, "--run-dir", "runs/fineweb-2b")
        assert config["run"]["dir"] == f"{root}/runs" and config["run"]["name"] == "fineweb-2b"
        assert config["artifacts"]["dir"] == f"{root}/artifacts/fineweb-2b"
        assert config["artifacts"]["tokenizer_dir"] == f"{root}/artifacts/tokenizer/fineweb"
        assert config["artifacts"]["tokens_dir"] == f"{root}/artifacts/tokens/fineweb"
    assert printed(*cloud, "--run-dir", "/elsewhere/a")["run"]["dir"] == "/elsewhere"
    assert printed(*cloud)["run"] == {"name": "local", "dir": f"{place}/volume/runs", "seed": 1337}


def test_what_is_typed_wins_over_what_follows_from_flags(printed: Callable[..., Printed]) -> None:
    typed = ["corpus.text_field=body", 'corpus.val_paths=["b.jsonl"]', "artifacts.dir=here", "run.seed=3"]
    config = printed("--input", "a.jsonl", *typed)
    assert config["corpus"]["text_field"] == "body" and config["corpus"]["val_paths"] == ["b.jsonl"]
    assert config["artifacts"]["dir"] == "here" and config["run"]["name"] == "quickstart"
    Path("own.toml").write_text('run.dir = "trials"\ncorpus.kind = "files"\ncorpus.validation_fraction = 0.2\n')
    config = printed("--profile", "own.toml", "--input", "a.txt")
    assert config["run"]["dir"] == "trials" and config["corpus"]["validation_fraction"] == 0.2
    assert printed("--profile", "own.toml", "--input", "a.txt", "--root", "/mnt")["run"]["dir"] == "/mnt/runs"


def test_a_validation_set_beside_the_text_is_found(printed: Callable[..., Printed], place: Path) -> None:
    for folder in ("train", "val"):
        (place / "datasets" / folder / "tales").mkdir(parents=True)
    assert printed("--input", "datasets/train/tales")["corpus"]["val_paths"] == ["datasets/val/tales"]
    held_out = printed("--input", "datasets/train/tales", "corpus.validation_fraction=0.3")["corpus"]
    assert held_out["val_paths"] == [] and held_out["validation_fraction"] == 0.3
    (place / "datasets/val/tales").rmdir()
    assert printed("--input", "datasets/train/tales")["corpus"]["validation_fraction"] == 0.05
    assert printed("--input", "datasets/val")["corpus"]["val_paths"] == []


def test_one_plain_text_is_cut_so_that_a_share_can_be_held_out(printed: Callable[..., Printed]) -> None:
    assert printed("--input", "a.txt")["corpus"]["max_document_characters"] == 2000
    assert printed("--input", "a.jsonl")["corpus"]["max_document_characters"] == 0
    assert printed("--input", "a.txt", "corpus.max_document_characters=0")["corpus"]["max_document_characters"] == 0


def test_runs_share_what_has_one_experiment(printed: Callable[..., Printed]) -> None:
    def shared(*arguments: str) -> object:
        return printed(*arguments)["artifacts"]["tokenizer_dir"]

    assert shared("--input", "a.txt", "--run-dir", "runs/one") == "artifacts/tokenizer/one"
    assert shared("--input", "datasets/train/a.jsonl.gz", "--run-dir", "runs/one") == "artifacts/tokenizer/a"
    assert shared("--input", "a.txt", "--experiment", "both") == "artifacts/tokenizer/both"
    assert shared("--run-dir", "runs/one") == ""
    assert shared("--input", "a.txt", "--name", "two") == "artifacts/tokenizer/two"


# -- what is refused


def test_a_file_that_is_wrong_is_told_as_ever(refused: Callable[..., str]) -> None:
    Path("own.toml").write_text('run = 3\ncorpus = "text"\n')
    smoke = ["--profile", "own.toml", "--input", "a.txt"]
    assert "is a table and has settings" in refused(*smoke, "--mode", "local", code=2)
    Path("own.toml").write_text("[trainig]\nmax_steps = 3\n")
    assert "did you mean `training`?" in refused(*smoke, code=2)
    Path("own.toml").write_text("[training\n")
    assert "is not valid TOML" in refused(*smoke, code=2)
    assert "There is no configuration file other.toml" in refused("--profile", "other.toml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "m3_medum"], "there is no profile 'm3_medum'; did you mean `m3_medium`?"),
        (["--profile", "Xyz!"], "the names are "),
        (["--profile", "local", "--config", "a.toml"], "either --profile or --config, not both"),
        (["--input", "a.txt", "corpus.kind=files"], "either --input or corpus.kind=…, not both"),
        (["--input", "a.txt", 'corpus={train_paths=["b"]}'], "either --input or corpus.train_paths=…, not both"),
        (["--run-dir", "runs/a", "--name", "b"], "either --run-dir or run.name=…, not both"),
        (["--run-dir", "runs/a", "run.dir=b"], "either --run-dir or run.dir=…, not both"),
        (["--tokenizer-json", "a", "tokenizer.path=b"], "either --tokenizer-json or tokenizer.path=…, not both"),
        (["--tokenizer-json", "a", "--force-retrain-tokenizer"], "or --force-retrain-tokenizer, not both"),
        (["--run-dir", ".."], "--run-dir .. has no name"),
        (["--run-dir", "runs/.hidden"], "no dot in front; not '.hidden' (from --run-dir)"),
        (["--input", "a.txt", "--experiment", "a/b"], "--experiment a/b is no name for a folder"),
        (["--mode", "clowd"], "invalid choice: 'clowd'"),
    ],
)
def test_flags_that_cannot_be_meant(refused: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refused(*arguments, code=2)


def test_text_that_is_missing_or_empty(refused: Callable[..., str], place: Path) -> None:
    smoke = ["--profile", "local", "--input"]
    assert "nothing.txt does not exist; check the path" in refused(*smoke, "nothing.txt")
    assert "data/input.txt does not exist" in refused("--profile", "local")
    (place / "empty.txt").touch()
    assert "empty.txt is empty; give it some text" in refused(*smoke, "empty.txt")
    (place / "folder").mkdir()
    assert "folder holds no .jsonl, .txt" in refused(*smoke, "folder")
    (place / "folder" / "a.txt").touch()
    assert "folder is empty" in refused(*smoke, "folder")
    (place / "a.pdf").write_text("x")
    assert "a.pdf is not one of .jsonl" in refused(*smoke, "a.pdf")


def test_a_folder_above_both_splits(refused: Callable[..., str], place: Path) -> None:
    write_shards(place)
    assert "holds train and val; name what to train on" in refused("--profile", "local", "--input", "datasets")


def test_places_that_cannot_be_written(
    refused: Callable[..., str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "a.txt").write_text("some text")
    smoke = ["--profile", "local", "--input", "a.txt"]
    assert "no folder /nowhere/at/all, the root of --mode cloud" in refused(
        *smoke, "--mode", "cloud", "--root", "/nowhere/at/all"
    )
    (place / "file").touch()
    assert "cannot be written, because of file; choose another --root" in refused(*smoke, "--root", "file")
    assert "cannot be written, because of file; choose another artifacts.dir" in refused(
        "--profile", "local", "artifacts.dir=file/a"
    )
    monkeypatch.setattr("os.access", lambda *arguments: False)
    assert "choose another --root" in refused(*smoke, "--mode", "cloud", "--root", str(place))


# -- shards


@pytest.mark.parametrize(("format", "zipped"), [("lines", False), ("lines", True), ("jsonl", False)])
def test_sound_shards_are_accepted(place: Path, capsys: pytest.CaptureFixture[str], format: str, zipped: bool) -> None:
    from cli.shards import check_path

    folder = write_shards(place, format=format, zipped=zipped)
    check_path(folder)
    check_path(folder.parent)
    said = capsys.readouterr().err
    documents = json.loads((folder / MANIFEST).read_text())["documents"]
    assert said.count(f"{folder}: {documents} documents in {len(list(folder.glob('shard-*')))} shards") == 2


def without_one(folder: Path) -> None:
    (folder / "shard-00001.lines").unlink()


def without_any(folder: Path) -> None:
    for shard in folder.glob("shard-*"):
        shard.unlink()


def cut_off(folder: Path) -> None:
    shard = folder / "shard-00001.lines"
    shard.write_bytes(shard.read_bytes()[:-5])


def flipped(folder: Path) -> None:
    shard = folder / "shard-00001.lines"
    shard.write_bytes(shard.read_bytes().replace(b"mouse", b"louse", 1))


def with_one_more(folder: Path) -> None:
    (folder / "shard-00009.lines").write_text("not from here\n")


def with_a_torn_manifest(folder: Path) -> None:
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace('"documents"', '"documentz"'))


def with_another_number_of_lines(folder: Path) -> None:
    seal_directory(folder, extra={"kind": KIND, "documents": 7})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_one, "train/tales is damaged: shard-00001.lines is missing"),
        (without_any, "train/tales is damaged: shard-00000.lines is missing"),
        (cut_off, "shard-00001.lines has "),
        (flipped, "the content of shard-00001.lines does not match its SHA-256"),
        (with_one_more, "shard-00009.lines is not in "),
        (with_a_torn_manifest, "does not match its own checksum"),
        (with_another_number_of_lines, "lines where manifest.json says 7"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_that_are_not_whole_are_named(
    refused: Callable[..., str], place: Path, damage: Callable[[Path], None], message: str, split: str
) -> None:
    write_shards(place)
    damage(place / "datasets" / split / "tales")
    error = refused("--profile", "local", "--input", "datasets/train/tales")
    assert message.replace("train/tales", f"{split}/tales") in error


def test_a_manifest_of_something_else_is_no_matter(place: Path) -> None:
    from cli.shards import check_path

    (place / "mine").mkdir()
    (place / "mine" / MANIFEST).write_text("{}")
    (place / "mine" / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    check_path(place / "mine")
