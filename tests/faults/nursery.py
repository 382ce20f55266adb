"""Runs that are killed: a process that has imported everything forks the victims, so that kills land in training.

    python -m tests.faults.nursery PLANS.json REPORTS.json

A plan says which run, how many ranks and kills (0 = undisturbed); its report says what was hit and how each attempt
ended. A victim tells its parent where it is by a byte of shared memory for its main thread and one for its checkpoint
writer: what they hold after a SIGKILL is what the kill has hit. To aim, the victim writes to a pipe when it enters the
stage, and the parent kills a moment later.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it when they are first built, which takes longer than the whole run

import cli.training
from cli.training import EXIT_CODES, train_from_config
from config.loading import load, shipped
from config.schemas import TrainConfig
from trainkit import artifacts, checkpoint_writer
from trainkit.artifacts import verify_directory
from trainkit.checkpoints import list_checkpoints
from trainkit.errors import UserError
from trainkit.task import Loss
from trainkit.watchdog import Watchdog

STAGES = (
    *("start", "data", "first step", "step", "evaluate", "sample", "save", "snapshot", "finish"),
    *("idle", "write", "seal", "fsync", "rename", "between", "renamed", "verify", "prune", "saved"),
)
GROUPS = {
    "first step": "step",
    "seal": "write",
    "fsync": "write",
    "between": "rename",
    "renamed": "rename",
    "evaluate": "evaluation",
}
AIMS = ("step", "write", "verify", *2 * ("snapshot", "prune", "evaluate"), *3 * ("rename",))
"""Stages to aim at; more often where kills at random seldom hit."""
BAD_SAMPLE = 22
"""Its loss is NaN, in every run: the step that takes it must change nothing, on all ranks, killed or not."""
TIMEOUT = 120.0
GRACE = 2.0
"""Seconds until the other ranks of one that was killed are ended, as a launcher does."""


@dataclass(frozen=True)
class Aim:
    """Which rank to kill, and when: `delay` seconds after the start, or after the n-th time it enters `stage`."""

    rank: int
    delay: float
    stage: str = ""
    occurrence: int = 1
    holds: bool = False
    """Whether the thread that has entered the stage waits there for the kill; the other goes on."""
    signal: int = signal.SIGKILL
    """`SIGTERM` asks instead: the run saves and stops."""


class Marks:
    """Where each rank is: two bytes of memory that parent and children share."""

    def __init__(self, ranks: int) -> None:
        self._memory = mmap.mmap(-1, max(2 * ranks, mmap.PAGESIZE))

    def put(self, rank: int, thread: int, stage: str) -> None:
        self._memory[2 * rank + thread] = STAGES.index(stage)

    def get(self, rank: int) -> tuple[str, str]:
        return STAGES[self._memory[2 * rank]], STAGES[self._memory[2 * rank + 1]]


def instrument(marks: Marks, rank: int, aim: Aim | None, pipe: int) -> None:
    """In the victim: note every stage, and call out at the one that is aimed at."""
    seen = Counter[str]()

    def note(thread: int, stage: str) -> None:
        marks.put(rank, thread, stage)
        if aim is not None and aim.rank == rank and GROUPS.get(stage, stage) == GROUPS.get(aim.stage, aim.stage):
            seen[stage] += 1
            if sum(seen.values()) == aim.occurrence:
                os.write(pipe, b"!")
                time.sleep(TIMEOUT if aim.holds else 0)

    watch, save = Watchdog.enter, checkpoint_writer.save_checkpoint

    def enter(self: Watchdog, phase: str, step: int) -> None:
        note(0, phase)
        watch(self, phase, step)

    def hook(stage: str) -> None:
        note(0 if stage == "snapshot" else 1, stage)

    def save_and_rest(*arguments: Any) -> Path:
        try:
            return save(*arguments)
        finally:
            note(1, "idle")

    # Reading the metadata of every installed package would be most of a short attempt.
    cli.training.create_run_directory.__globals__["describe_environment"] = dict
    Watchdog.enter = enter
    artifacts.step_hook = hook
    checkpoint_writer.save_checkpoint = save_and_rest
    marks.put(rank, 0, "start")
    marks.put(rank, 1, "idle")


class Poisoned:
    """An objective whose loss is NaN where a certain sample is: on one rank, in one step."""

    def __init__(self, objective: Any, sample: int) -> None:
        self._objective, self._sample = objective, sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, model: Any, batch: Any, denominators: Any) -> Loss:
        loss = self._objective.loss(model, batch, denominators)
        factor = torch.where((batch["sample"] == self._sample).any(), torch.nan, 1.0)
        return Loss(loss.value * factor, loss.metrics)


def poison(sample: int) -> None:
    build = cli.training.build_objective
    cli.training.build_objective = lambda *arguments: Poisoned(build(*arguments), sample)


def fork_rank(rank: int, environment: dict[str, str], output: Path, body: Callable[[], int]) -> int:
    """The process id of a child that runs `body` and exits with what it returns."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ |= environment
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = body()
    except UserError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        code = error.exit_code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def attempt(config: TrainConfig, ranks: int, output: Path, aim: Aim | None) -> dict[str, Any]:
    """One start of the run with `--resume`; returns exit codes, and what a kill has hit."""
    marks, port = Marks(ranks), free_port()
    reader, writer = os.pipe()

    def body(rank: int) -> int:
        torch.manual_seed(rank + os.getpid())  # nothing may depend on it
        instrument(marks, rank, aim, writer)
        poison(BAD_SAMPLE)
        return EXIT_CODES[train_from_config(config, resume=True).status]

    started = time.monotonic()
    children = {
        fork_rank(rank, rank_environment(rank, ranks, port), output, lambda rank=rank: body(rank)): rank
        for rank in range(ranks)
    }
    os.close(writer)
    codes: dict[int, int] = {}
    hit: tuple[str, str] | None = None
    if aim is not None:
        if aim.stage:
            select.select([reader], [], [], TIMEOUT)  # readable too when every victim has ended
            time.sleep(aim.delay)
        else:
            time.sleep(max(0.0, started + aim.delay - time.monotonic()))
        victim = next(child for child, rank in children.items() if rank == aim.rank)
        reap(children, codes)
        if aim.rank not in codes:
            os.kill(victim, aim.signal)
            hit = marks.get(aim.rank)
    deadline = time.monotonic() + (GRACE if hit and aim and aim.signal == signal.SIGKILL else TIMEOUT)
    while len(codes) < ranks and time.monotonic() < deadline:
        reap(children, codes)
        time.sleep(0.002)
    ended_by_launcher = [rank for rank in range(ranks) if rank not in codes]
    for child, rank in children.items():
        if rank in ended_by_launcher:
            os.kill(child, signal.SIGKILL)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reader)
    was_killed = hit is not None and aim is not None and codes[aim.rank] == -signal.SIGKILL
    return {
        "codes": [codes[rank] for rank in range(ranks)],
        "hit": list(hit) if hit and was_killed else None,
        "asked": list(hit) if hit and aim and aim.signal == signal.SIGTERM else None,
        "aim": aim.stage if aim else "",
        "ended_by_launcher": ended_by_launcher,
        "seconds": time.monotonic() - started,
    }


def reap(children: dict[int, int], codes: dict[int, int]) -> None:
    for child, rank in children.items():
        if rank not in codes:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)


def torture(plan: dict[str, Any]) -> dict[str, Any]:
    """Kill the run again and again, beginning another when it has come to its end, and let the last one finish."""
    draw, ranks = random.Random(plan["seed"]), plan["ranks"]
    attempts: list[dict[str, Any]] = []
    runs: list[str] = []
    while count_hits(attempts) < plan["kills"]:
        runs.append(f"{plan['name']}-{len(runs)}")
        config = configuration(plan, runs[-1])
        output = Path(config.run.dir) / f"{runs[-1]}.txt"
        while not attempts or attempts[-1]["codes"] != [0] * ranks or attempts[-1]["run"] != runs[-1]:
            aim = draw_aim(plan, draw) if count_hits(attempts) < plan["kills"] else None
            attempts.append({"run": runs[-1], **attempt(config, ranks, output, aim)})
            if attempts[-1]["hit"] and draw.random() < plan["damage"]:
                attempts[-1]["damaged"] = damage_newest(Path(config.run.dir) / runs[-1] / "checkpoints", draw)
            if len(attempts) > 4 * plan["kills"] + 8:
                raise RuntimeError(f"no progress; see {output}: {attempts[-4:]}")
    return {"attempts": attempts, "runs": runs}


def count_hits(attempts: list[dict[str, Any]]) -> int:
    return sum(attempt["hit"] is not None for attempt in attempts)


def draw_aim(plan: dict[str, Any], draw: random.Random) -> Aim:
    """Inside a stage, at any moment of training, or at any moment at all."""
    rank, which = draw.randrange(plan["ranks"]), draw.random()
    if which < 0.1:
        return Aim(rank, draw.uniform(0, plan["seconds"]))
    if which < 0.2:
        return Aim(rank, draw.uniform(0, plan["seconds"]), "first step", signal=signal.SIGTERM)
    if which < 1 - plan["aimed"]:
        return Aim(rank, draw.uniform(0, plan["seconds"]), "first step")
    stage = draw.choice(AIMS)
    only_main = stage not in ("step", "evaluate")  # the other ranks save nothing
    holds = stage != "step" and draw.random() < 0.8  # these stages are short: the kill would often come too late
    return Aim(0 if only_main else rank, draw.uniform(0, 0.002), stage, draw.randint(1, 4), holds)


def damage_newest(root: Path, draw: random.Random) -> str:
    """Flip a bit of a file, cut it or delete it, unless nothing intact would be left; returns its name."""
    paths = list_checkpoints(root)[-2:]
    try:
        for path in paths:
            verify_directory(path)
    except UserError:
        return ""
    if len(paths) < 2:
        return ""
    file = draw.choice(sorted(path for path in paths[-1].rglob("*") if path.is_file()))
    content = bytearray(file.read_bytes())
    match draw.choice(["flip", "cut", "delete"]):
        case "flip":
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[: draw.randrange(len(content))])
        case _:
            file.unlink()
    return str(file.relative_to(root))


def configuration(plan: dict[str, Any], name: str) -> TrainConfig:
    return load(TrainConfig, shipped("train"), [*plan["settings"], f"run.name={name}"]).config


def undisturbed(plan: dict[str, Any]) -> dict[str, Any]:
    config = configuration(plan, plan["name"])
    output = Path(config.run.dir) / f"{plan['name']}.txt"
    return {"attempts": [attempt(config, plan["ranks"], output, None)], "runs": [plan["name"]]}


def main() -> None:
    plans = json.loads(Path(sys.argv[1]).read_text())
    reports = [(torture if plan["kills"] else undisturbed)(plan) for plan in plans]
    Path(sys.argv[2]).write_text(json.dumps(reports))


if __name__ == "__main__":
    main()
