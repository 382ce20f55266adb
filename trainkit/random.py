"""Random numbers without hidden state: each draw is a pure function of what it is for.

Bits come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a keyed bijection
of 128-bit counters. The counter says which number is meant, the key is the seed, so nothing has to be saved to resume,
any past step can be replayed, and the number of ranks or the size of a micro-batch cannot matter.

    key      64 bits    the seed
    counter  32 bits    position // 4 (a block yields four 32-bit words)
             32 bits    row, low half  (the global sample index, in training)
             32 bits    row, bits 32..55, and the purpose in the top byte
             32 bits    step

The arithmetic is 64-bit integer arithmetic that wraps, so bits and uniforms are equal on CPU and GPU; `normal` goes
through logarithm and cosine and agrees to rounding.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a random number is for. Values are part of the format of every run: append, never renumber."""

    INIT = 0
    DATA_ORDER = 1
    DROPOUT = 2
    DIFFUSION_TIME = 3
    DIFFUSION_MASK = 4
    SAMPLING = 5
    CORPUS = 6
    DIFFUSION_LENGTH = 7


_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product; the shift of a negative product is cut back by the mask."""
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words (they broadcast); returns four such tensors."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(seed: int, purpose: Purpose, rows: Tensor, length: int, *, step: int = 0) -> Tensor:
    """Words in [0, 2³²) as int64 [len(rows), length], on the device of `rows` (int64 [n], each in [0, 2⁵⁶))."""
    rows = rows.reshape(-1, 1)
    blocks = torch.arange((length + 3) // 4, device=rows.device).reshape(1, -1)
    high = ((rows >> 32) & 0xFFFFFF) | (int(purpose) << 24)
    words = philox(seed, (blocks, rows & _MASK, high, torch.full_like(blocks, step & _MASK)))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).reshape(len(rows), -1)[:, :length]


def uniform(seed: int, purpose: Purpose, rows: Tensor, length: int, *, step: int = 0) -> Tensor:
    """Uniform on [0, 1), float64 [len(rows), length], each with 53 random bits."""
    bits = random_bits(seed, purpose, rows, 2 * length, step=step).reshape(len(rows), length, 2)
    return ((bits[..., 0] << 21) | (bits[..., 1] >> 11)).to(torch.float64) * 2.0**-53


def normal(seed: int, purpose: Purpose, rows: Tensor, length: int, *, step: int = 0) -> Tensor:
    """Standard normal, float64 [len(rows), length], by the Box-Muller transform of pairs of uniforms."""
    pairs = (length + 1) // 2
    u = uniform(seed, purpose, rows, 2 * pairs, step=step).reshape(len(rows), 2, pairs)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[:, 0]))
    angle = 2.0 * math.pi * u[:, 1]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :length]


def derive_seed(seed: int, name: str) -> int:
    """A 64-bit seed of its own for `name` (a parameter, an epoch), the same on every platform."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def permute(index: npt.NDArray[np.int64], size: int, seed: int, purpose: Purpose) -> npt.NDArray[np.int64]:
    """Where `index` goes under a keyed permutation of range(size): no table, any element in constant time.

    A Feistel network on the smallest even number of bits that holds `size` is a bijection of a domain at most four
    times as large; an image outside of the range is permuted again until it falls inside ("cycle walking", Black &
    Rogaway 2002), which keeps it a bijection of the range.
    """
    assert size >= 1 and (index.size == 0 or (int(index.min()) >= 0 and int(index.max()) < size))
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    keys = [np.uint64(derive_seed(seed, f"permute/{int(purpose)}/{i}")) for i in range(8)]

    def permute_once(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = value >> shift, value & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        return (left << shift) | right

    result = permute_once(index.astype(np.uint64))
    while (outside := result >= np.uint64(size)).any():
        result[outside] = permute_once(result[outside])
    return result.astype(np.int64)


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele et al. 2014): each input bit flips each output bit about half of the time."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
