"""Any number of ranks computes the same bits, whatever optimizer, precision and strategy. All ranks are real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainkit.ranks import alone, run_on_ranks
from tests.trainkit.test_loop import ListLog, make_run, newest, sha, stop_after
from tests.trainkit.toys import NextToken, TinyLanguageModel, ToySource
from trainkit.distribution import World, any_rank
from trainkit.errors import EXIT_USAGE, UserError
from trainkit.loop import train
from trainkit.reduction import LocalReducer, Reducer, TreeReducer, add_over_ranks
from trainkit.replicas import check_distribution
from trainkit.specs import AdamWSpec, DistributedSpec, MuonSpec, TrainingSpec
from trainkit.task import Batch, Loss
from trainkit.tree import finished_pairs, odd_part, tree_sum

LEAF, SAMPLES = 2, 24  # 12 leaves a step: four blocks of three
CASES = {
    "adamw": (AdamWSpec(learning_rate=0.01), "fp32"),
    "muon": (MuonSpec(learning_rate=0.01), "fp32"),
    "adamw-bf16": (AdamWSpec(learning_rate=0.01), "bf16"),
    "muon-bf16": (MuonSpec(learning_rate=0.01), "bf16"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Generator[None]:
    """As many as the ranks have: `threads` is part of what decides about bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the tree ----------------------------------------------------------------------------------------------------------


def sum_by_definition(values: list[float]) -> float:
    half, rest = divmod(len(values), 2)
    if rest:
        total = values[0]
        for value in values[1:]:
            total += value
        return total
    return sum_by_definition(values[:half]) + sum_by_definition(values[half:])


def test_tree_sum_is_its_definition_and_ranks_hold_subtrees() -> None:
    draw = random.Random(0)
    for n in range(1, 49):
        values = [draw.gauss(0, 10 ** draw.uniform(-8, 8)) for _ in range(n)]
        wanted = sum_by_definition(values)
        as_tensor = torch.tensor(values, dtype=torch.float64)
        assert tree_sum(as_tensor).item() == wanted
        for ranks in (1, 2, 4, 8):
            if n % ranks == 0:
                parts = as_tensor.view(ranks, -1)
                assert tree_sum(torch.stack([tree_sum(part) for part in parts])).item() == wanted
    assert [odd_part(n) for n in (1, 2, 3, 12, 40)] == [1, 1, 3, 3, 5]
    assert [finished_pairs(i) for i in range(8)] == [0, 1, 0, 2, 0, 1, 0, 3]


def test_one_rank_adds_any_number_of_micro_batches_whatever_came_before() -> None:
    """1 (which needs no adding) among others, as ramps of the batch size have it, and after a step that failed."""
    generator = torch.Generator().manual_seed(0)
    weight, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    reducer = TreeReducer([weight, unused], alone())
    for count in (1, 3, 1, 4, 12, 1, 6):
        failed, leaves = torch.randn(3, generator=generator), torch.randn(count, 3, generator=generator)
        with reducer.leaf(0, 2):
            (weight * failed).sum().backward()
        for index, leaf in enumerate(leaves):
            with reducer.leaf(index, count):
                (weight * leaf).sum().backward()
        reducer.finish()
        assert weight.grad is not None
        assert unused.grad is not None
        assert weight.grad.tolist() == tree_sum(leaves).tolist()
        assert unused.grad.tolist() == [0.0, 0.0]


def local_reducer(model: nn.Module) -> LocalReducer:
    return LocalReducer(model)


def tree_reducer(model: nn.Module) -> TreeReducer:
    return TreeReducer(model.parameters(), alone())


@pytest.mark.parametrize("reducer_of", [local_reducer, tree_reducer])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_that_autograd_leaves_in_one_memory_are_parted(
    reducer_of: Callable[..., Reducer], count: int
) -> None:
    """Parameters that meet through views: adding and clipping in place would happen to both, twice."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))])
    reducer = reducer_of(model)
    for index in range(count):
        with reducer.leaf(index, count):
            (10 * (model[0][None] + model[1][None])).sum().backward()
    reducer.finish()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for parameter in model:
        assert parameter.grad is not None
        assert parameter.grad.tolist() == pytest.approx([6**-0.5] * 3, rel=1e-4)


@pytest.mark.parametrize(
    ("training", "distributed", "samples", "ranks", "words"),
    [
        ({}, {}, 10, 2, "divisor of 10"),
        ({}, {}, 24, 3, "1, 2, 4, 8"),
        ({}, {}, 12, 2, "smaller training.device_batch_size"),
        ({"threads": 0}, {}, 24, 2, "training.threads"),
        ({}, {"strategy": "fsdp"}, 24, 2, "use zero1"),
    ],
)
def test_tree_refuses_what_it_cannot_promise(
    training: dict[str, Any], distributed: dict[str, Any], samples: int, ranks: int, words: str
) -> None:
    spec = TrainingSpec(**{"device_batch_size": 4, "threads": 1, **training})
    with pytest.raises(UserError, match=words) as error:
        check_distribution(DistributedSpec(reduction="tree", **distributed), spec, AdamWSpec(), samples, ranks)
    assert error.value.exit_code == EXIT_USAGE
    check_distribution(DistributedSpec(**distributed), spec, AdamWSpec(), samples, ranks)  # `sum` takes anything
    right = TrainingSpec(device_batch_size=4, threads=1)
    check_distribution(DistributedSpec(reduction="tree"), right, AdamWSpec(), 24, 2)


def test_a_run_in_tree_mode_keeps_what_decides_about_its_bits(tmp_path: Path) -> None:
    run_case(alone(), tmp_path, "adamw", training={"max_steps": 2})
    for name, value in (("device_batch_size", 4), ("threads", 2)):
        with pytest.raises(UserError, match=f"training.{name}"):
            run_case(alone(), tmp_path, "adamw", training={name: value}, resume=True)


def test_fsdp_refuses_what_it_cannot_do() -> None:
    spec = DistributedSpec(strategy="fsdp")
    check_distribution(spec, TrainingSpec(), AdamWSpec(), 24, 2)
    check_distribution(spec, TrainingSpec(), MuonSpec(), 25, 1)
    for optimizer, samples, words in ((MuonSpec(), 24, "use zero1, or adamw"), (AdamWSpec(), 25, "change training")):
        with pytest.raises(UserError, match=words):
            check_distribution(spec, TrainingSpec(), optimizer, samples, 2)


# -- whole runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uneven:
    """Rows that do not count here and there, and a whole micro-batch of them in every step."""

    source: ToySource

    def steps(self, states: list[dict[str, Any]] | None) -> Generator[tuple[list[Batch], dict[str, Any]]]:
        for batches, state in self.source.steps(states):
            yield [self._thinned(batch) for batch in batches], state

    def _thinned(self, batch: Batch) -> Batch:
        sample = batch["sample"] % SAMPLES
        return {**batch, "valid": batch["valid"] & (sample % 5 != 3) & (sample // LEAF != 4)}


def run_case(
    world: World, folder: Path, case: str, *, model: nn.Module | None = None, leaf: int = LEAF, **changes: Any
) -> Any:
    """A short run in tree mode; returns its result, its records and the SHA-256 of its tensors."""
    optimizer, precision = CASES[case]
    log = ListLog()
    training = {
        "max_steps": 6,
        "total_batch_size": SAMPLES,
        "device_batch_size": leaf,
        "threads": 1,
        "log_every": 2,
        "save_every": 0,
        "eval_every": 0,
        "precision": precision,
        **changes.pop("training", {}),
    }
    run = make_run(
        folder,
        log,
        world=world,
        training=training,
        source=Uneven(ToySource(world, samples=SAMPLES, micro=leaf)),
        optimizer=optimizer,
        distributed=DistributedSpec(reduction="tree", strategy=changes.pop("strategy", "replicate")),
        **({"model": model} if model else {}),
        **{name: value for name, value in changes.items() if name != "resume"},
    )
    result = train(run, resume=newest(folder) if changes.get("resume") else None)
    return result.status, result.step, log, sha(folder) if world.is_main and newest(folder) else ""


class Poisoned(NextToken):
    """The loss of the micro-batches that hold certain samples is NaN."""

    def __init__(self, *bad: int) -> None:
        self._bad = torch.tensor(bad)

    def loss(self, model: nn.Module, batch: Batch, denominators: Mapping[str, Tensor]) -> Loss:
        loss = super().loss(model, batch, denominators)
        factor = torch.where(torch.isin(batch["sample"], self._bad).any(), torch.nan, 1.0)
        return Loss(loss.value * factor, loss.metrics)


class Blocks(nn.Module):
    """For FSDP, which makes one block whole after the other. (It does not know `nn.GRU`, which hides its weights.)"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.last = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.last(x)


def run_fsdp(world: World, folder: Path) -> Any:
    """Six steps with FSDP, interrupted and resumed, with averaged weights and evaluation on the way."""
    changes = {"training": {"max_steps": 6, "eval_every": 2, "save_every": 0}, "world": world}
    changes |= {
        "distributed": DistributedSpec(strategy="fsdp"),
        "source": ToySource(world, samples=SAMPLES, micro=LEAF),
    }
    changes |= {"toy": "mlp"}
    train(make_run(folder, ListLog(), model=Blocks(), stop_requested=stop_after(2), **changes))
    any_rank(False, world)  # the others wait while the first one writes
    log = ListLog()
    result = train(make_run(folder, log, model=Blocks(), **changes), resume=newest(folder))
    any_rank(False, world)
    return result.status, result.step, log, newest(folder) if world.is_main else None


ONE_BAD = 2 * SAMPLES + 21  # in step 3, of the last rank's last micro-batches
MANY_BAD = tuple(step * SAMPLES + 21 for step in (2, 3, 4))


def all_runs(world: World, folder: Path) -> dict[str, Any]:
    """Everything that this file asks of a number of ranks, so that the processes start only once."""
    found = {case: run_case(world, folder / case, case) for case in CASES}
    found["fsdp"] = run_fsdp(world, folder / "fsdp")
    for case in ("adamw", "muon"):
        found[f"{case} zero1"] = run_case(world, folder / f"{case}-zero1", case, strategy="zero1")
    found["skip"] = run_case(world, folder / "skip", "adamw", task=Poisoned(ONE_BAD))
    found["skip muon"] = run_case(world, folder / "skip-muon", "muon", task=Poisoned(ONE_BAD))
    training = {"batch_size_factors": ((2, 2), (4, 3)), "save_every": 3}
    found["growing"] = run_case(world, folder / "growing", "adamw", training=training)
    training = {"max_skipped_steps": 3, "save_every": 1}
    found["stop"] = run_case(world, folder / "stop", "adamw", task=Poisoned(*MANY_BAD), training=training)
    return found


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = all_runs(alone(), tmp_path_factory.mktemp("one"))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return run_on_ranks(2, all_runs, folder, folder)


def test_two_ranks_compute_the_bits_of_one(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    exact = {name: run for name, run in one_rank.items() if name != "fsdp"}
    for name, (status, step, log, digest) in exact.items():
        (status_0, step_0, log_0, digest_0), (status_1, step_1, log_1, _) = (rank[name] for rank in two_ranks)
        assert (status, step) == (status_0, step_0) == (status_1, step_1), name
        assert log.records == log_0.records == log_1.records, name
        assert digest == digest_0 and digest, name
    assert len({digest for _, _, _, digest in exact.values()}) == 8  # zero1 equals replicate, and nothing else


def test_fsdp_equals_one_rank_to_rounding(one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]) -> None:
    status, step, log, snapshot = one_rank["fsdp"]
    status_0, step_0, log_0, snapshot_0 = two_ranks[0]["fsdp"]
    assert (status, step) == (status_0, step_0) == two_ranks[1]["fsdp"][:2] == ("finished", 6)
    for part in ("model", "optimizer", "average"):
        mine, theirs = getattr(snapshot, part), getattr(snapshot_0, part)
        assert mine.keys() == theirs.keys() and mine
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)
    losses = [[float.fromhex(r.get("loss", r.get("val_loss"))) for r in run.records] for run in (log, log_0)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_bad_step_on_one_rank_changes_nothing_and_the_run_goes_on(one_rank: dict[str, Any]) -> None:
    for name in ("skip", "skip muon"):
        status, step, log, _ = one_rank[name]
        assert (status, step) == ("finished", 6)
        (told,) = [text for text in log.messages if "changed nothing" in text]
        assert told.startswith("step 3 ") and f"samples: {ONE_BAD - 1}, {ONE_BAD}" in told


def test_bad_steps_in_a_row_end_the_run_and_nothing_of_them_is_kept(
    one_rank: dict[str, Any], two_ranks: list[dict[str, Any]]
) -> None:
    for found in (one_rank, *two_ranks):
        status, step, log, _ = found["stop"]
        assert (status, step) == ("non-finite", 5)
        assert "3 steps in a row" in log.messages[-1]


def exchange(world: World) -> list[Tensor]:
    totals = []
    for length in (1, 5, 64):
        values = torch.randn(length * world.size, generator=torch.Generator().manual_seed(world.rank))
        add_over_ranks(values, torch.empty(len(values) // 2), world)
        totals.append(values)
    return totals


@pytest.mark.slow
def test_three_ranks_add_as_well(tmp_path: Path) -> None:
    by_rank = run_on_ranks(3, exchange, tmp_path)
    for index, length in enumerate((1, 5, 64)):
        parts = [torch.randn(length * 3, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
        for totals in by_rank:
            torch.testing.assert_close(totals[index], torch.stack(parts).sum(0))
            assert torch.equal(totals[index], by_rank[0][index])


# -- about a million parameters, more ranks, ranks that change ---------------------------------------------------------


def large_model() -> nn.Module:
    model = TinyLanguageModel(vocab_size=1000, width=256)
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.1e6
    return model


def large_runs(world: World, folder: Path, cases: tuple[str, ...], chain: Path, stop: int) -> dict[str, Any]:
    found = {case: run_case(world, folder / case, case, model=large_model())[3] for case in cases}
    for case in cases:
        stops = stop_after(stop) if stop else (lambda: False)
        run_case(world, chain / case, case, model=large_model(), resume=True, stop_requested=stops)
    return found


def large_runs_of_many_leaves(world: World, folder: Path, cases: tuple[str, ...]) -> dict[str, Any]:
    """24 leaves a step: eight blocks of three."""
    return {case: run_case(world, folder / case, case, model=large_model(), leaf=1)[3] for case in cases}


def on_ranks(ranks: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> dict[str, Any]:
    folder.mkdir()
    if ranks == 1:
        return function(alone(), folder, *arguments)
    return run_on_ranks(ranks, function, folder, folder, *arguments)[0]


@pytest.mark.slow
def test_one_two_and_four_ranks_and_changes_among_them_give_one_sha(tmp_path: Path) -> None:
    chain, cases = tmp_path / "chain", tuple(CASES)
    one = on_ranks(1, large_runs, tmp_path / "1", cases, chain, 2)  # stops after step 2
    two = on_ranks(2, large_runs, tmp_path / "2", cases, chain, 1)  # resumes, agrees a step later: step 4
    assert {newest(chain / case).trainer["step"] for case in cases} == {4}
    four = on_ranks(4, large_runs, tmp_path / "4", cases, chain, 1)
    on_ranks(1, large_runs, tmp_path / "1-again", cases, chain, 0)
    assert one == two == four == {case: sha(chain / case) for case in cases}
    assert len(set(one.values())) == len(CASES)


@pytest.mark.torture
def test_eight_ranks_give_the_same_sha(tmp_path: Path) -> None:
    cases = ("adamw", "muon-bf16")
    one, eight = (on_ranks(n, large_runs_of_many_leaves, tmp_path / str(n), cases) for n in (1, 8))
    assert one == eight and len(set(one.values())) == 2
