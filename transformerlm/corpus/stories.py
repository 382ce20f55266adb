"""Children's stories whose true probability is known.

`sample` tells a story, `log_prob` says how likely the grammar was to tell exactly that one, and `entropy` is the mean
of its negative: the loss that no model can beat. What separates a model from it is the model's own distance from the
truth.

Training and validation stories come from the same grammar with different seeds (`split_seed`). Two stories are equal
with probability `exp(-collision_entropy())`, below 1e-30: a split needs no deduplication.
"""

from __future__ import annotations

import re
from functools import cache
from hashlib import blake2b, sha256
from typing import Literal

from transformerlm.corpus.grammar import Grammar, compile_grammar
from transformerlm.corpus.plots import RULES
from transformerlm.corpus.words import SLOTS


@cache
def grammar() -> Grammar:
    """The compiled grammar of the stories."""
    return compile_grammar(RULES, SLOTS, start="story")


def sample(seed: int, index: int) -> str:
    """Story `index` of the corpus with this seed: the same text on every platform, whatever was sampled before."""
    return grammar().sample(b"%d:%d" % (seed, index))


def split_seed(seed: int, split: Literal["train", "val", "test"]) -> int:
    """The seed of one split, so that splits of a corpus draw from unrelated streams."""
    return int.from_bytes(blake2b(f"{seed}:{split}".encode(), digest_size=8).digest()) >> 1


def log_prob(text: str) -> float:
    """Natural log of the probability of this whole text; -inf for a text that is no story of the grammar."""
    return grammar().log_prob(text)


def entropy() -> float:
    """Exact entropy of a story in nats: the least mean loss per story that a model can reach."""
    return grammar().entropy


def collision_entropy() -> float:
    """Two independent stories are equal with probability exp(-this)."""
    return grammar().collision_entropy


@cache
def word_forms() -> frozenset[str]:
    """The distinct words, in lower case, that stories are made of."""
    return frozenset(word.lower() for piece in grammar().pieces() for word in re.findall(r"[A-Za-z]+", piece))


@cache
def fingerprint() -> str:
    """Identity of the distribution: changes whenever a rule, a word or a weight does."""
    tables = [
        (slot.name, slot.given, sorted((key, table.outcomes, table.weights) for key, table in slot.tables.items()))
        for slot in SLOTS.values()
    ]
    return sha256(repr((RULES, tables)).encode()).hexdigest()
