"""Validation during a run: in portions, each with noise of its own, alike for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from cli import validation
from cli.validation import DOCUMENTS_AT_ONCE, MAIN, build_evaluator
from config.loading import load, shipped
from config.schemas import TrainConfig
from tests.trainkit.ranks import alone
from trainkit.distribution import World
from transformerlm.evaluation.diffusion import Bound, IntArray
from transformerlm.evaluation.likelihood import Scores
from transformerlm.models.build import create_model
from transformerlm.models.specs import TransformerSpec

MODEL = create_model(TransformerSpec(context_length=8, num_layers=1, d_model=8, num_heads=1), vocab_size=8, seed=0)


@dataclass(frozen=True)
class Alike:
    """The same document again and again."""

    count: int
    about = "alike"
    identity = "alike"

    def __len__(self) -> int:
        return self.count

    def documents(self, first: int, last: int) -> Iterable[IntArray]:
        return [np.array([1, 2, 3])] * (last - first)


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_portion_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    scored: list[tuple[int, int]] = []

    def score(predictor: Any, documents: Iterable[IntArray], spec: Any, *, seed: int) -> Bound:
        lengths = np.array([len(document) for document in documents])
        scored.append((seed, len(lengths)))
        return Bound(Scores(np.full(len(lengths), float(seed)), lengths, lengths), 0.0)

    monkeypatch.setattr(validation, "score", score)
    monkeypatch.setattr(validation, "Predictor", lambda *parts: None)
    monkeypatch.setattr(validation, "gather_over_ranks", lambda value, world: [value])
    monkeypatch.setattr(validation, "reading_of", lambda objective: None)
    config = load(TrainConfig, shipped("train")).config
    worlds = [alone()] if ranks == 1 else [World(rank=r, size=2, device=torch.device("cpu")) for r in range(2)]
    for world in worlds:
        evaluate = build_evaluator(config, None, {MAIN: Alike(150)}, world)  # pyright: ignore[reportArgumentType]
        assert evaluate is not None
        evaluate(MODEL, 1)
    assert sorted(scored) == [(0, DOCUMENTS_AT_ONCE), (64, DOCUMENTS_AT_ONCE), (128, 150 - 2 * DOCUMENTS_AT_ONCE)]
