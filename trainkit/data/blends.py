"""Several sources of samples mixed by weights: which of them sample g of the run comes from, and its number there.

For the stable order the samples are dealt along a binary tree: at each fork the left half of the members gets every
sample at which ⌊turn · share + ½⌋ steps, turn being how many samples have come to the fork. So how many samples a
member has had is a formula, not a count: any sample is found in O(log members), nothing is stored, and a longer run
only appends. Of the first n samples each member has its share of n to within one sample per fork on its way.

For the order of Megatron-LM the samples go one by one to the member that is furthest behind its weight, as in
`BlendedDataset`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainkit.errors import UserError

if TYPE_CHECKING:
    from trainkit.data.orders import Order

Int64Array = npt.NDArray[np.int64]
Deal = Callable[[Int64Array], tuple[Int64Array, Int64Array]]
"""Which member each of the given samples [n] comes from, and its number there: two int64 [n]."""

MEGATRON_SURPLUS = 0.005
"""Megatron-LM's `mid_level_dataset_surplus`: by so much more is laid out of each member than its weight asks for."""


@dataclass(frozen=True, eq=False)
class Blend:
    """An order whose samples come from several others of the same window length."""

    members: Sequence[Order]
    deal: Deal
    facts: Mapping[str, Any]
    """What the identity of the whole adds to that of its members, JSON values."""
    count: int | None

    @property
    def name(self) -> str:
        return ", ".join(member.name for member in self.members)

    @property
    def identity(self) -> dict[str, Any]:
        data = [member.identity["data"] for member in self.members]
        return {**self.members[0].identity, "data": data, **self.facts}

    def read(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]:
        owners, within = self.deal(samples)
        present = np.unique(owners)
        parts = [self.members[owner].read(within[owners == owner]) for owner in present]
        rows = np.concatenate([np.flatnonzero(owners == owner) for owner in present])
        tokens, documents = (np.empty((len(samples), parts[0][0].shape[1]), np.int64) for _ in range(2))
        tokens[rows] = np.concatenate([part[0] for part in parts])
        documents[rows] = np.concatenate([part[1] for part in parts])
        return tokens, documents


# -- stable ------------------------------------------------------------------------------------------------------------


def deal_by_weight(weights: Sequence[float]) -> Deal:
    """Deal samples in proportion to `weights` (each above 0), by a formula in the sample's number (below 2⁶²).

    Shares are kept as multiples of 2⁻³²: over 10⁹ samples they are off by less than one for each fork.
    """
    return lambda samples: _deal(samples, list(weights))


def _deal(turns: Int64Array, weights: list[float]) -> tuple[Int64Array, Int64Array]:
    if len(weights) == 1:
        return np.zeros_like(turns), turns
    middle = len(weights) // 2
    share = round(sum(weights[:middle]) / sum(weights) * 2**32)
    share = min(max(share, 1), 2**32 - 1)  # nobody is left out
    before = _share_of(turns, share)
    is_left = _share_of(turns + 1, share) > before
    owners, within = np.empty_like(turns), np.empty_like(turns)
    owners[is_left], within[is_left] = _deal(before[is_left], weights[:middle])
    owners[~is_left], within[~is_left] = _deal((turns - before)[~is_left], weights[middle:])
    owners[~is_left] += middle
    return owners, within


def _share_of(turns: Int64Array, share: int) -> Int64Array:
    """⌊turns · share / 2³² + ½⌋ in 64 bits: the two halves of `turns` are multiplied apart."""
    high, low = turns >> 32, (turns & 0xFFFFFFFF).astype(np.uint64)
    return high * share + ((low * np.uint64(share) + np.uint64(1 << 31)) >> np.uint64(32)).astype(np.int64)


# -- Megatron-LM -------------------------------------------------------------------------------------------------------


class MegatronShares(NamedTuple):
    """How many samples `BlendedMegatronDatasetBuilder` lays out."""

    size: int
    """Of the blend: a little more than the run takes."""
    built: list[int]
    """Of each member."""


def megatron_shares(weights: Sequence[float], num_samples: int) -> MegatronShares:
    needed = [math.ceil(num_samples * weight) for weight in _normalized(weights)]
    return MegatronShares(sum(needed), [math.ceil(count * (1 + MEGATRON_SURPLUS)) for count in needed])


def deal_by_greedy_error(weights: Sequence[float], size: int, available: Sequence[int]) -> Deal:
    """Each of `size` samples goes to the member whose count is furthest below its weight, the first of equals.

    A member that is asked for more than its `available` samples is a `UserError`, as it is an error in Megatron-LM: by
    rounding, that happens in short runs of many members.
    """
    # Twice, as there: the second time changes the last bit of some weights, and with it some ties.
    shares = np.array(_normalized(_normalized(weights)))
    owners, within = np.empty(size, np.int16), np.empty(size, np.int64)
    _compiled_greedy()(shares, owners, within)
    for member, (count, most) in enumerate(zip(np.bincount(owners, minlength=len(shares)), available, strict=True)):
        if count > most:
            raise UserError(
                f"the blend of Megatron-LM asks entry {member} of data.blend_prefixes for {count} samples and lays out "
                f'{most}: the run is too short for these weights; set data.order = "stable"'
            )
    return lambda samples: (owners[samples].astype(np.int64), within[samples])


def _normalized(weights: Sequence[float]) -> list[float]:
    values = np.array(weights, np.float64)
    return (values / values.sum()).tolist()


@cache
def _compiled_greedy() -> Callable[[npt.NDArray[np.float64], npt.NDArray[np.int16], Int64Array], None]:
    """A step depends on all before it, so that no array operation can do it. Numba comes in only where it is needed."""
    from numba import njit

    return njit(nogil=True)(_greedy)


def _greedy(weights: npt.NDArray[np.float64], owners: npt.NDArray[np.int16], within: Int64Array) -> None:
    counts = np.zeros(len(weights), np.int64)
    for sample in range(len(owners)):
        expected = max(float(sample), 1.0)
        owner, largest = 0, weights[0] * expected - counts[0]
        for member in range(1, len(weights)):
            error = weights[member] * expected - counts[member]
            if error > largest:
                owner, largest = member, error
        owners[sample], within[sample] = owner, counts[owner]
        counts[owner] += 1
