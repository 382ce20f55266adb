"""Between two records the host never waits for the GPU: CUDA itself is asked to refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainkit.test_loop import ListLog, make_run
from tests.trainkit.toys import ToySource
from trainkit.distribution import World
from trainkit.loop import train
from trainkit.specs import LoggingSpec

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

LOG_EVERY = 10


class Strict(ToySource):
    """Has every synchronisation refused, except after the step that ends in a record.

    Rows come from pinned memory, as the loaders of data hand them over: copies from other memory wait.
    """

    def steps(self, states: Any) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for number, (batches, state) in enumerate(super().steps(states), start=1):
            pinned = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
            # The first steps allocate; from then on a step that has no record waits for nothing.
            is_quiet = number > LOG_EVERY and number % LOG_EVERY != 0
            torch.cuda.set_sync_debug_mode("error" if is_quiet else "default")
            yield pinned, state


@pytest.fixture(autouse=True)
def _default_afterwards() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("training", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"ema_decay": 0.0}])
def test_the_host_runs_ahead(tmp_path: Path, training: dict[str, Any]) -> None:
    world = World(rank=0, size=1, device=torch.device("cuda", 0))
    log = ListLog()
    settings = {"max_steps": 50, "log_every": LOG_EVERY, "eval_every": 0, "save_every": 0, "device": "cuda"}
    run = make_run(
        tmp_path, log, toy="mlp", world=world, source=Strict(world), checkpoints=None, evaluate=None,
        logging=LoggingSpec(norms_every=2 * LOG_EVERY, activation_norms=True), training=settings | training,
    )  # fmt: skip
    assert train(run).step == 50
    assert [r["step"] for r in log.records if r["kind"] == "train"] == [10, 20, 30, 40, 50]


def test_a_wait_is_refused() -> None:
    """The test above could fail: a hidden `.item()` raises here."""
    torch.cuda.set_sync_debug_mode("error")
    value = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        value.item()
