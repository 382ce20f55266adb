"""Counter-based random numbers: the published test vectors of Philox, and the properties that training relies on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.random import Purpose, derive_seed, normal, permute, philox, random_bits, uniform

# Known answers of the reference implementation (Random123 1.14, tests/kat_vectors, philox4x32 10 rounds).
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = philox(key[0] | key[1] << 32, tuple(torch.tensor([c]) for c in counter))
    assert [int(word) for word in words] == expected


def test_a_number_depends_on_its_coordinates_alone() -> None:
    rows = torch.arange(10)
    whole = uniform(7, Purpose.SAMPLING, rows, 33, step=5)
    assert torch.equal(whole[3:6], uniform(7, Purpose.SAMPLING, rows[3:6], 33, step=5))
    assert torch.equal(whole[:, :9], uniform(7, Purpose.SAMPLING, rows, 9, step=5))
    others = [
        uniform(8, Purpose.SAMPLING, rows, 33, step=5),
        uniform(7, Purpose.INIT, rows, 33, step=5),
        uniform(7, Purpose.SAMPLING, rows, 33, step=6),
        uniform(7, Purpose.SAMPLING, rows + 2**32, 33, step=5),
    ]
    assert not any((whole == other).any() for other in others)


def test_uniform_and_normal_have_their_distribution() -> None:
    rows = torch.arange(200)
    u = uniform(1, Purpose.INIT, rows, 1000).flatten()
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom; both bounds lie beyond 3.5 standard deviations
    z = normal(1, Purpose.INIT, rows, 1001).flatten()
    moments = [float((z**k).mean()) for k in (1, 2, 3, 4)]
    assert np.allclose(moments, [0, 1, 0, 3], atol=0.06)


def test_bits_fill_all_32_positions() -> None:
    bits = random_bits(3, Purpose.DROPOUT, torch.arange(100), 100)
    ones = [float(((bits >> k) & 1).double().mean()) for k in range(32)]
    assert all(abs(share - 0.5) < 0.025 for share in ones)
    assert int(bits.min()) >= 0 and int(bits.max()) < 2**32


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, seed: int) -> None:
    image = permute(np.arange(size), size, seed, Purpose.DATA_ORDER)
    assert np.array_equal(np.sort(image), np.arange(size))
    some = np.arange(size)[:: max(1, size // 7)]
    assert np.array_equal(permute(some, size, seed, Purpose.DATA_ORDER), image[some])


def test_permute_shuffles_and_reaches_far() -> None:
    size = 10_000
    image = permute(np.arange(size), size, 1, Purpose.DATA_ORDER)
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.05
    assert not np.array_equal(image, permute(np.arange(size), size, 2, Purpose.DATA_ORDER))
    huge = 10**15
    assert 0 <= int(permute(np.array([huge - 1]), huge, 1, Purpose.DATA_ORDER)[0]) < huge


def test_permute_has_no_favourite_orders() -> None:
    """All 24 orders of four elements appear about equally often over seeds."""
    orders: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(permute(np.arange(4), 4, seed, Purpose.DATA_ORDER).tolist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 24
    assert sum((n - 100) ** 2 / 100 for n in orders.values()) < 55  # 23 degrees of freedom, p ≈ 2e-4


def test_derived_seeds_differ_and_stay() -> None:
    assert derive_seed(1, "a") != derive_seed(1, "b") != derive_seed(2, "b")
    assert derive_seed(1, "a") == derive_seed(1, "a") < 2**64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_draws_the_same_bits() -> None:
    rows = torch.arange(1000) + 2**40
    here = uniform(9, Purpose.DIFFUSION_MASK, rows, 257, step=3)
    there = uniform(9, Purpose.DIFFUSION_MASK, rows.cuda(), 257, step=3)
    assert torch.equal(here, there.cpu())
