"""Hub data sets against a server on this machine that speaks the hub's protocol and fails by script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainkit import hub_cases
from trainkit.errors import UserError
from trainkit.retries import Backoff, TransientError, Trouble, retry

CASES = [name for name in vars(hub_cases) if name.startswith("case_")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process for all cases, because to import `datasets` takes longer than most of them."""
    command = [sys.executable, "-m", "tests.trainkit.hub_cases", str(tmp_path_factory.mktemp("hub"))]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_hub(case: str, results: dict[str, str]) -> None:
    assert not results[case], results[case]


def test_the_libraries_log_nothing(results: dict[str, str]) -> None:
    assert not results["noise"]


def test_waits_double_up_to_the_cap_and_begin_anew_after_success() -> None:
    now, waits, lines = [0.0], [], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    backoff = Backoff(first=2, cap=10, clock=lambda: now[0], sleep=sleep, jitter=lambda: 0.5)
    trouble = Trouble("the well", backoff, lines.append)
    answers = iter([TransientError("dry")] * 5 + [TransientError("dry", retry_after=60), None])

    def draw() -> str:
        if error := next(answers):
            raise error
        return "water"

    assert retry(draw, trouble) == "water"
    assert waits == [1.5, 3, 6, 7.5, 7.5, 60]
    assert lines[0] == "cannot read the well (dry); trying again in 2 s"
    assert len(lines) == 7 and lines[-1] == "reading the well again after 86 s"
    with pytest.raises(UserError, match="the well: on fire, for"):
        while True:
            trouble.wait(TransientError("on fire"))
    assert now[0] - sum(waits[:6]) <= backoff.give_up_after


@pytest.mark.parametrize(("answers", "seconds"), [([False] * 99, 60), ([False, False, True] + [False] * 99, 1800)])
def test_whoever_was_never_heard_of_is_not_waited_for_long(answers: list[bool], seconds: float) -> None:
    now = [0.0]

    def sleep(wait: float) -> None:
        now[0] += wait

    backoff = Backoff(clock=lambda: now[0], sleep=sleep, jitter=lambda: 1.0)
    trouble = Trouble("the hub", backoff, lambda line: None, "look for the plug", was_heard=False)
    with pytest.raises(UserError, match="look for the plug"):
        for is_answer in answers:
            trouble.wait(TransientError("silence", is_answer=is_answer))
    assert seconds - 30 <= now[0] <= seconds


def test_what_is_not_transient_is_not_tried_again() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise UserError("no")

    with pytest.raises(UserError):
        retry(fail, Trouble("x", Backoff(), calls.append))
    assert calls == [1]
