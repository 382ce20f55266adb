"""The gradient of a step does not depend on how its rows are cut up, over micro-batches or over ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.trainkit.ranks import alone, run_on_ranks
from tests.trainkit.toys import TOYS, cut, make_rows, pad
from trainkit.distribution import World
from trainkit.reduction import WrapperReducer
from trainkit.replicas import Replica, _data_parallel, replicate
from trainkit.step import accumulate_gradients

ROWS = 11
# How the rows are cut: per rank, the sizes of its micro-batches. Uneven on purpose, in number too.
ONE_RANK = {"whole": [[11]], "uneven": [[4, 1, 6]], "rows": [[1] * 11]}
TWO_RANKS = {"even": [[4, 2], [3, 2]], "uneven": [[1, 5, 2], [3]], "lopsided": [[10], [1]]}


Gradients = dict[str, Tensor]


def gradients(
    world: World, toy: str, cuts: list[list[int]], hold: Callable[[nn.Module, World], Replica] = replicate
) -> tuple[Gradients, dict[str, tuple[float, float]]]:
    build, task = TOYS[toy]
    model = build().double()
    bounds = [sum(sum(sizes) for sizes in cuts[:rank]) for rank in range(world.size + 1)]
    mine = make_rows(torch.arange(bounds[world.rank], bounds[world.rank + 1]), torch.float64)
    micro_batches = [pad(part, len(part["valid"]) + 2) for part in cut(mine, cuts[world.rank])]
    replica = hold(model, world)
    accumulate_gradients(replica, task, micro_batches[:1], world)  # of an earlier step: nothing of it stays
    sums = accumulate_gradients(replica, task, micro_batches, world)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads, {name: tuple(pair) for name, pair in zip(sums.names, sums.values.tolist(), strict=True)}


def plain(model: nn.Module, world: World) -> Replica:
    """What a single GPU uses."""
    return Replica(model, model, WrapperReducer(model, nullcontext))


def all_gradients(world: World) -> dict[tuple[str, ...], dict[str, Tensor]]:
    return {
        (toy, name, hold.__name__): gradients(world, toy, cuts, hold)[0]
        for toy in TOYS
        for name, cuts in TWO_RANKS.items()
        for hold in (replicate, _data_parallel)
    }


def reference(toy: str) -> dict[str, Tensor]:
    """One process, one batch, no padding, plain autograd on the mean over what counts."""
    build, task = TOYS[toy]
    model = build().double()
    batch = make_rows(torch.arange(ROWS), torch.float64)
    weights = {name: w.double() for name, w in task.weights(batch).items()}
    task.loss(model, batch, weights).value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 0
    for name, value in wanted.items():
        assert value.abs().max() > 1e-4, f"{name}: the reference gradient is empty, the test would prove nothing"
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("name", ONE_RANK)
def test_accumulation_gives_the_gradient_of_the_whole_batch(toy: str, name: str) -> None:
    for hold in (replicate, plain):
        grads, metrics = gradients(alone(), toy, ONE_RANK[name], hold)
        assert_same(grads, reference(toy))
        assert all(count > 0 for _, count in metrics.values())


def test_two_ranks_give_the_gradient_of_one_process(tmp_path: Path) -> None:
    for by_case in run_on_ranks(2, all_gradients, tmp_path):
        for (toy, *_), grads in by_case.items():
            assert_same(grads, reference(toy))


def test_a_mean_of_means_would_be_noticed() -> None:
    """The toys are uneven enough that the classical mistake changes the gradient."""
    build, task = TOYS["language"]
    model = build().double()
    for part in cut(make_rows(torch.arange(ROWS), torch.float64), [4, 1, 6]):
        weights = {name: w.double() for name, w in task.weights(part).items()}
        (task.loss(model, part, weights).value / 3).backward()
    wrong = {name: p.grad for name, p in model.named_parameters()}
    with pytest.raises(AssertionError):
        assert_same(wrong, reference("language"))


def test_a_batch_in_which_nothing_counts_gives_zero_not_nan() -> None:
    build, task = TOYS["two-terms"]
    model = build()
    batch = make_rows(torch.arange(3)) | {"valid": torch.zeros(3, dtype=torch.bool)}
    accumulate_gradients(replicate(model, alone()), task, [batch], alone())
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)
