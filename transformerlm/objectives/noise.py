"""Which tokens are masked: a function of seed and sample number alone, computed on the CPU.

A masking schedule says with which probability p(t) a token is masked at time t in [0, 1]. The negative evidence lower
bound of a token sequence is

    ∫ dt p′(t)/p(t) · E[ Σ over masked i of −log p(token i | what is not masked) ]

(Sahoo et al. 2024, arXiv:2406.07524; Shi et al. 2024, arXiv:2406.04329, who write α = 1 − p). Substituting p for t
shows that every schedule from 0 to 1 has the same integral: a schedule chooses how often each p is tried, the weight
p′/p undoes the choice. A `clipped` schedule leaves out a part of the integral and is therefore no bound on the
likelihood (Arriola et al. 2025, arXiv:2503.09573, who use it to lower the variance of gradients).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from trainkit.random import Purpose, derive_seed, permute, uniform
from transformerlm.objectives.specs import DiffusionSpec


def mask_probability(spec: DiffusionSpec, time: Tensor) -> Tensor:
    """p(t), float64 as `time`."""
    match spec.schedule:
        case "linear":
            return time
        case "cosine":
            return torch.cos(math.pi / 2 * (1 - time))
        case "polynomial":
            return time**spec.exponent
        case "clipped":
            return spec.mask_low + (spec.mask_high - spec.mask_low) * time


def loss_weight(spec: DiffusionSpec, time: Tensor) -> Tensor:
    """p′(t)/p(t): what the loss of a masked token counts, infinite where p is zero and nothing is masked."""
    match spec.schedule:
        case "linear":
            return 1 / time
        case "cosine":
            return math.pi / 2 * torch.tan(math.pi / 2 * (1 - time))
        case "polynomial":
            return spec.exponent / time
        case "clipped":
            return (spec.mask_high - spec.mask_low) / mask_probability(spec, time)


def stratified_times(seed: int, samples: Tensor, *, samples_per_step: int, blocks: int = 1) -> Tensor:
    """A time for each block of each sample, float64 [rows, blocks]; `samples` int64 [rows] are numbers in the run.

    The times of one step's B samples lie one in each of B · blocks equal parts of [0, 1): the step's average weighs all
    noise levels alike, which takes most of the variance out of it. Which part a sample gets is permuted anew in each
    step, so that its place in the step (its lane, its rank) says nothing about it.
    """
    numbers = samples.numpy()
    steps, places = np.divmod(numbers, samples_per_step)
    cells = samples_per_step * blocks
    strata = np.empty((len(numbers), blocks), np.int64)
    for step in np.unique(steps):
        rows = steps == step
        index = (places[rows, None] * blocks + np.arange(blocks)).ravel()
        key = derive_seed(seed, f"strata/{step}")
        strata[rows] = permute(index, cells, key, Purpose.DIFFUSION_TIME).reshape(-1, blocks)
    return (torch.from_numpy(strata) + uniform(seed, Purpose.DIFFUSION_TIME, samples, blocks)) / cells


def draw_mask(seed: int, samples: Tensor, probability: Tensor, eligible: Tensor) -> Tensor:
    """bool [rows, length]: each eligible token masked with its `probability` (float64, [rows, length])."""
    numbers = uniform(seed, Purpose.DIFFUSION_MASK, samples, eligible.shape[1])
    return eligible & (numbers < probability)
