from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.schedules import learning_rate_factor
from trainkit.specs import ConstantScheduleSpec, CosineScheduleSpec, ScheduleSpec, WSDScheduleSpec

SCHEDULES: list[ScheduleSpec] = [
    ConstantScheduleSpec(warmup_steps=10),
    CosineScheduleSpec(warmup_steps=10, final_fraction=0.1),
    WSDScheduleSpec(warmup_steps=10, decay_fraction=0.3, final_fraction=0.05),
]


@pytest.mark.parametrize("spec", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(spec: ScheduleSpec) -> None:
    factors = [learning_rate_factor(spec, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))


def test_each_ends_where_it_says() -> None:
    ends = [learning_rate_factor(spec, 99, 100) for spec in SCHEDULES]
    assert ends == pytest.approx([1, 0.1, 0.05])


def test_wsd_is_flat_until_its_decay_and_then_linear() -> None:
    factors = [learning_rate_factor(SCHEDULES[2], step, 100) for step in range(100)]
    assert factors[10:70] == [1] * 60
    assert factors[70] < 1
    steps = [a - b for a, b in pairwise(factors[69:])]
    assert steps == pytest.approx([0.95 / 30] * 30)


def test_cosine_is_half_way_in_the_middle() -> None:
    spec = CosineScheduleSpec(warmup_steps=0, final_fraction=0)
    assert learning_rate_factor(spec, 50, 101) == pytest.approx(0.5)
    assert learning_rate_factor(spec, 25, 101) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(SCHEDULES))
def test_any_horizon_gives_factors_between_zero_and_one(max_steps: int, step: int, spec: ScheduleSpec) -> None:
    assert 0 <= learning_rate_factor(spec, min(step, max_steps - 1), max_steps) <= 1
