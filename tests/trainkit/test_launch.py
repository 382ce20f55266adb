"""Ranks that a command starts itself: one end for all of them, whatever happens. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainkit.test_loop import ListLog, make_run, newest
from trainkit.distribution import gather_over_ranks, open_world
from trainkit.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_WATCHDOG, UserError
from trainkit.launch import _cause, _Rank, launch, processes_to_start
from trainkit.loop import train
from trainkit.specs import DistributedSpec, TrainingSpec

ROOT = Path(__file__).parents[2]
FOR_EVER = 1_000_000


@contextmanager
def start(folder: Path, steps: int) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.trainkit.launched", str(folder), str(steps)]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        yield process
        process.kill()


def training_ranks(folder: Path) -> list[int]:
    """Process numbers of both ranks, once both train."""
    files = [folder / f"pid-{rank}" for rank in range(2)]
    while not all(file.exists() for file in files):
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        while lives(pid):
            time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether the process runs; one that has ended may stay listed (`Z`) where nobody collects orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert processes_to_start(DistributedSpec(), "cpu") == 1
    assert processes_to_start(DistributedSpec(processes=3), "cpu") == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    counts = [processes_to_start(DistributedSpec(processes="auto"), name) for name in ("auto", "cuda", "cuda:1", "cpu")]
    assert counts == [4, 4, 1, 1]
    monkeypatch.setenv("RANK", "0")  # under torchrun
    assert processes_to_start(DistributedSpec(processes=3), "cpu") == 1


@pytest.mark.slow
def test_a_signal_to_the_command_saves_on_all_ranks_and_it_goes_on_to_the_end(tmp_path: Path) -> None:
    with start(tmp_path, FOR_EVER) as command:
        ranks = training_ranks(tmp_path)
        command.send_signal(signal.SIGTERM)
        output, _ = command.communicate()
    assert command.returncode == EXIT_REQUEUE, output
    status, step = output.split()[-2:]
    assert status == "preempted"
    wait_until_gone(ranks)
    with start(tmp_path, int(step) + 3) as command:
        output, _ = command.communicate()
    assert command.returncode == 0, output
    assert output.split()[-2:] == ["finished", str(int(step) + 3)]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_all(tmp_path: Path, victim: int) -> None:
    with start(tmp_path, FOR_EVER) as command:
        ranks = training_ranks(tmp_path)
        os.kill(ranks[victim], signal.SIGKILL)
        output, _ = command.communicate()
    assert command.returncode == 1 and f"refused: rank {victim} of 2 was ended by SIGKILL" in output, output
    wait_until_gone(ranks)


@pytest.mark.slow
def test_ranks_leave_when_the_command_is_killed(tmp_path: Path) -> None:
    with start(tmp_path, FOR_EVER) as command:
        ranks = training_ranks(tmp_path)
        command.kill()
        command.communicate()
    wait_until_gone(ranks)


def cannot_validate(folder: Path, rank: int) -> None:
    with open_world(TrainingSpec(device="cpu", threads=1)) as world:

        def evaluate(model: nn.Module, step: int) -> dict[str, float]:
            if world.rank == rank and step > 10:
                raise UserError("the validation text is gone")
            return {"val_loss": float(sum(gather_over_ranks(step, world)))}

        train(make_run(folder, ListLog(), world=world, evaluate=evaluate))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_go_on_in_the_middle_ends_all_with_its_sentence(tmp_path: Path, rank: int) -> None:
    with pytest.raises(UserError, match="the validation text is gone"):
        launch(2, cannot_validate, tmp_path, rank)
    assert newest(tmp_path).trainer["step"] == 14


@pytest.mark.parametrize(
    ("codes", "cause"), [((1, -9), 1), ((1, EXIT_WATCHDOG), 1), ((EXIT_INTERRUPTED, 1), 0), ((1, 1), 0)]
)
def test_the_cause_is_not_the_rank_that_only_noticed(codes: tuple[int, int], cause: int) -> None:
    ranks = [_Rank(number, Any, Any, exit_code=code) for number, code in enumerate(codes)]
    assert _cause(ranks) == ranks[cause]


def refuse(exit_code: int) -> None:
    raise UserError("no such file", exit_code)


@pytest.mark.slow
def test_a_refusal_of_the_ranks_is_that_of_the_command() -> None:
    with pytest.raises(UserError, match="no such file") as error:
        launch(2, refuse, 2)
    assert error.value.exit_code == 2
