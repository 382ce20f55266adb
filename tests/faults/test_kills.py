"""A run that is killed anywhere, any number of times, ends as the one that was left alone: to the bit, with no hand.

Some of the signals are SIGTERM, and some checkpoints are damaged between two attempts.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cli import make_data, train_tokenizer
from tests.faults.nursery import BAD_SAMPLE, GROUPS, count_hits
from trainkit.artifacts import verify_directory
from trainkit.checkpoints import list_checkpoints, load_snapshot
from trainkit.run_directory import read_status
from transformerlm.corpus.stories import sample

ROOT = Path(__file__).parents[2]
SOURCES = {
    "megatron": ('data.megatron_train_prefix="{place}/train"', 'data.megatron_val_prefix="{place}/val"'),
    **{
        mode: (
            f"data.pipeline_mode={mode}",
            'data.dataset_name="{place}/stories.jsonl"',
            "data.validation_fraction=0.1",
            "data.lanes=2",
            "data.shuffle_window=8",
        )
        for mode in ("packed", "rows")
    },
}
SAMPLES_PER_STEP = 4
PHASES = ("step", "snapshot", "write", "rename", "prune", "evaluation")
SETTINGS = (
    'tokenizer.path="{place}/tokenizer"',
    'run.dir="{place}"',
    "model.num_layers=1",
    "model.d_model=16",
    "model.num_heads=2",
    "model.context_length=32",
    f"training.total_batch_size={SAMPLES_PER_STEP * 32}",
    "training.device_batch_size=2",
    "training.log_every=1",
    "training.eval_every=7",
    "training.save_every=3",
    "training.threads=1",
    "training.ema_decay=0.9",
    "training.device=cpu",
    "schedule.warmup_steps=5",
    "evaluation.max_documents=2",
    "evaluation.stride=32",
    "inference.prompts=[]",
    "logging.console=off",
    "logging.csv=false",
    "logging.plots=false",
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Tokenizer, token files and text of a few stories."""
    stories = [json.dumps({"text": sample(1, number)}) for number in range(60)]
    (tmp_path / "stories.jsonl").write_text("\n".join(stories) + "\n")
    text = ["corpus.num_train_stories=60", "corpus.num_val_stories=6"]
    assert train_tokenizer.main([*text, "tokenizer.vocab_size=300", f"output.dir={tmp_path}/tokenizer"]) == 0
    outputs = [f"output.train_prefix={tmp_path}/train", f"output.val_prefix={tmp_path}/val"]
    assert make_data.main([*text, f"tokenizer.path={tmp_path}/tokenizer", *outputs]) == 0
    return tmp_path


def plan(place: Path, source: str, ranks: int, kills: int, *, steps: int, **more: Any) -> dict[str, Any]:
    settings = [text.format(place=place) for text in (*SETTINGS, *SOURCES[source])]
    name = f"{source}-{ranks}-{'killed' if kills else 'undisturbed'}"
    facts = {"seed": 1, "aimed": 0.6, "damage": 0.3, "seconds": 1.0}
    return facts | {
        "name": name,
        "ranks": ranks,
        "kills": kills,
        "settings": [*settings, f"training.max_steps={steps}"],
        **more,
    }


def carry_out(place: Path, plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    (place / "plans.json").write_text(json.dumps(plans))
    command = [sys.executable, "-m", "tests.faults.nursery", str(place / "plans.json"), str(place / "reports.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + "".join(path.read_text() for path in place.glob("*.txt"))
    return json.loads((place / "reports.json").read_text())


def losses(run: Path) -> list[tuple[str, int, str]]:
    """Every number that training and validation recorded, as hex."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "gradient_norm", "learning_rate", "val_loss")
    return [
        (name, record["step"], float(record[name]).hex())
        for record in records
        if record["kind"] in ("train", "eval")
        for name in names
        if name in record
    ]


def digest(run: Path) -> str:
    """SHA-256 of sorted names and tensor bytes of all that the last checkpoint holds."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    verify_directory(newest)
    snapshot = load_snapshot(newest)
    total = hashlib.sha256()
    for part in (snapshot.model, snapshot.optimizer, snapshot.average):
        for name in sorted(part):
            total.update(name.encode() + part[name].numpy().tobytes())
    return total.hexdigest()


def check(place: Path, undisturbed: str, report: dict[str, Any], steps: int) -> Counter[str]:
    """Every run of the report equals the undisturbed one, bad step included; returns how often each stage was hit."""
    expected = losses(place / undisturbed)
    bad = 1 + BAD_SAMPLE // SAMPLES_PER_STEP
    assert [step for name, step, _ in expected if name == "loss"] == [n for n in range(1, steps + 1) if n != bad]
    for run in report["runs"]:
        assert losses(place / run) == expected
        assert digest(place / run) == digest(place / undisturbed)
        assert read_status(place / run)["status"] == "finished"
        assert f"step {bad} changed nothing: " in (place / run / "metrics.jsonl").read_text()
        assert not [path.name for path in (place / run / "checkpoints").iterdir() if path.name.startswith(".")]
    for attempt in report["attempts"]:
        if attempt["asked"] and attempt["asked"][0] != "start":
            assert set(attempt["codes"]) in ({75}, {0}), attempt  # all ranks agree
    hits = [attempt["hit"] for attempt in report["attempts"] if attempt["hit"]]
    return Counter(GROUPS.get(stage, stage) for hit in hits for stage in hit if stage not in ("idle", "saved"))


def test_twelve_kills(place: Path) -> None:
    steps = 24
    plans = [plan(place, "megatron", ranks, kills, steps=steps) for ranks in (1, 2) for kills in (0, 12 - 4 * ranks)]
    reports = carry_out(place, plans)
    for first in (0, 2):
        hits = check(place, plans[first]["name"], reports[first + 1], steps)
        assert (
            sum(attempt["hit"] is not None for attempt in reports[first + 1]["attempts"]) >= plans[first + 1]["kills"]
        )
        assert hits.keys() - {"start", "data"}, hits


@pytest.mark.torture
@pytest.mark.timeout(2400)
def test_two_hundred_kills(place: Path) -> None:
    """Over three pipelines, one and two ranks; prints the figures of `trainkit/README.md`."""
    steps, kills = 48, 44
    cases = [(source, ranks) for source in SOURCES for ranks in (1, 2)]
    plans = [
        plan(place, *case, kills=n, steps=steps, aimed=0.75, seed=seed)
        for seed, case in enumerate(cases)
        for n in (0, kills)
    ]
    reports = carry_out(place, plans)
    hits, total, runs = Counter[str](), 0, 0
    asked = damaged = 0
    for first in range(0, len(plans), 2):
        hits += check(place, plans[first]["name"], reports[first + 1], steps)
        total += count_hits(reports[first + 1]["attempts"])
        runs += len(reports[first + 1]["runs"])
        asked += sum(attempt["asked"] is not None for attempt in reports[first + 1]["attempts"])
        damaged += sum(bool(attempt.get("damaged")) for attempt in reports[first + 1]["attempts"])
    print(
        f"{total} kills, {asked} SIGTERM, {damaged} damaged checkpoints in {runs} runs of {steps} steps: {dict(hits)}"
    )
    assert total >= 200
    assert all(hits[phase] >= 20 for phase in PHASES), hits
