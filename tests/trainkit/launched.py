"""A command that trains a toy on ranks that it starts itself: `python -m tests.trainkit.launched FOLDER STEPS`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.trainkit.test_loop import ListLog, make_run, newest
from trainkit.artifacts import publish_file
from trainkit.distribution import open_world
from trainkit.errors import EXIT_REQUEUE, UserError
from trainkit.interrupts import catch_interrupts
from trainkit.launch import launch
from trainkit.loop import Result, train
from trainkit.specs import TrainingSpec


def work(folder: Path, steps: int) -> Result:
    """One rank; it leaves its process number in a file once it trains."""
    with open_world(TrainingSpec(device="cpu", threads=1)) as world, catch_interrupts() as interrupts:

        def stop_requested() -> bool:
            if not (folder / f"pid-{world.rank}").exists():
                publish_file(folder / f"pid-{world.rank}", str(os.getpid()))
            time.sleep(0.01)
            return interrupts.requested

        training = {"max_steps": steps, "save_every": 0, "eval_every": 0}
        run = make_run(folder / "run", ListLog(), world=world, training=training, stop_requested=stop_requested)
        return train(run, resume=newest(folder / "run"))


def main() -> int:
    try:
        result = launch(2, work, Path(sys.argv[1]), int(sys.argv[2]))
    except UserError as error:
        print(f"refused: {error}")
        return error.exit_code
    print(result.status, result.step)
    return EXIT_REQUEUE if result.status == "preempted" else 0


if __name__ == "__main__":
    raise SystemExit(main())
