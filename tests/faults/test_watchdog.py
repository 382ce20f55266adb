"""A rank that sleeps or is stopped: every process ends with code 4, stacks and the phase's name; slow is not dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.faults.nursery import free_port, rank_environment
from trainkit.watchdog import PATIENCE, Watchdog

ROOT = Path(__file__).parents[2]
START_SECONDS = 240
"""Seconds for two processes that import PyTorch on a busy machine."""
RANK = """
import sys, time
from pathlib import Path
from tests.trainkit.test_loop import ListLog, make_run
from tests.trainkit.toys import ToySource
from trainkit.distribution import open_world
from trainkit.loop import train
from trainkit.specs import TrainingSpec
from trainkit.watchdog import Watchdog

folder, sleeper = Path(sys.argv[1]), int(sys.argv[2])

class Slow(ToySource):
    def steps(self, states):
        for number, step in enumerate(super().steps(states)):
            if number == 4:
                (folder / f"trains-{self.world.rank}").touch()
            time.sleep(1000 if number == 5 and self.world.rank == sleeper else 0.05)
            yield step

with open_world(TrainingSpec(device="cpu", threads=1)) as world:
    dog = Watchdog(3.0, rank=world.rank, alarmed=(folder / f"alarm-{world.rank}").write_text)
    train(make_run(folder / "checkpoints", ListLog(), toy="mlp", world=world, source=Slow(world), watchdog=dog,
                   training={"max_steps": 5000, "save_every": 0, "eval_every": 0}))
"""


@pytest.fixture
def start(tmp_path: Path) -> Generator[Callable[[int], list[subprocess.Popen[str]]]]:
    """Starts two ranks, of which one may sleep; none of them survives the test."""
    ranks: list[subprocess.Popen[str]] = []

    def both(sleeper: int) -> list[subprocess.Popen[str]]:
        port = free_port()
        # Only the phases that start a process may take long: they do on a busy machine.
        patience = "import trainkit.watchdog as w; w.PATIENCE = {'start': 99, 'first step': 99}"
        for rank in (0, 1):
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | rank_environment(rank, 2, port)
            command = [sys.executable, "-c", patience + RANK, str(tmp_path), str(sleeper)]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
        return ranks

    yield both
    for rank in ranks:
        rank.kill()
        rank.communicate()


@pytest.mark.slow
def test_every_rank_ends_when_one_sleeps(tmp_path: Path, start: Callable[[int], list[subprocess.Popen[str]]]) -> None:
    ranks = start(1)
    errors = [rank.communicate(timeout=START_SECONDS)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [4, 4], errors
    expected = [("step", "in accumulate_gradients"), ("data", "in steps")]  # where each of them is
    for rank, (phase, place) in enumerate(expected):
        assert f"watchdog: rank {rank} has been in the phase '{phase}' of step 5" in errors[rank]
        assert place in errors[rank] and (tmp_path / f"alarm-{rank}").read_text() in errors[rank]


@pytest.mark.slow
def test_the_others_end_when_one_is_stopped(
    tmp_path: Path, start: Callable[[int], list[subprocess.Popen[str]]]
) -> None:
    ranks = start(-1)
    while not (tmp_path / "trains-1").exists():
        assert ranks[1].poll() is None
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGSTOP)
    _, error = ranks[0].communicate(timeout=START_SECONDS)
    assert ranks[0].returncode == 4 and "watchdog: rank 0" in error, error


@pytest.mark.parametrize(
    ("phase", "seconds", "code"), [("step", 300, 4), ("evaluate", 0.7, 0), ("evaluate", 300, 4), ("off", 0.7, 0)]
)
def test_each_phase_has_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, seconds: float, code: int
) -> None:
    """0.5 s and, for an evaluation, 1.5 s: from the last moment at which a busy machine let the process wait."""
    assert PATIENCE["evaluate"] > 1
    monkeypatch.setitem(PATIENCE, "evaluate", 3.0)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(tmp_path / "error", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        dog = Watchdog(0.0 if phase == "off" else 0.5)
        with dog.watching():
            dog.enter(phase, 7)
            time.sleep(seconds)
            dog.enter("data", 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    text = (tmp_path / "error").read_text()
    assert (f"in the phase '{phase}' of step 7" in text) == (code == 4)


def test_a_process_that_was_stopped_itself_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z and `fg`: the clock went on, the process did not."""
    child = os.fork()
    if child == 0:
        dog = Watchdog(1.0)
        with dog.watching():
            dog.enter("step", 1)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.3)
        os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    time.sleep(1.5)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
