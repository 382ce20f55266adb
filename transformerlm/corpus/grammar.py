"""A small formalism for texts with facts: one graph that is sampled, parsed and summed over.

A grammar is written as *rules* and *slots*. A rule maps templates to integer weights; in a template `[rule]` expands a
rule and `{slot.form}` mentions a slot. A slot draws its entry where it is first mentioned and repeats it ever after:
that is how a character keeps her name, and what an n-gram cannot see. An entry is a mapping of forms, so `{hero}`,
`{hero.they}` and `{hero.Their}` agree by construction. A slot may depend on a form of another one (`given`), so that
the hiding places of a lake are wet.

The rules compile to an acyclic graph of states. Each state says two things, and they are the grammar's whole meaning:
which `decision` it takes in the light of the facts so far, and how it `advance`s once the outcome is known. Sampling
draws the outcomes, parsing tries them, and `fold` sums over them: probabilities are written down once.
"""

from __future__ import annotations

import math
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import shake_128
from itertools import accumulate
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")

Entry: TypeAlias = Mapping[str, str]
"""The forms of one word: `{"it": "owl", "It": "Owl", "a": "an owl", …}`."""
Facts: TypeAlias = Mapping[str, Entry]
"""What a story has settled so far: the entry of each slot that has been mentioned."""
Rules: TypeAlias = Mapping[str, Mapping[str, int]]
"""Each rule's templates and their weights."""

DEFAULT_FORM = "it"
_REFERENCE = re.compile(r"\[(?P<rule>[\w.]+)\]|\{(?P<slot>\w+)(?:\.(?P<form>\w+))?\}")


@dataclass(frozen=True, eq=False)
class Weighted(Generic[T]):
    """A distribution over outcomes. Integer weights keep every probability an exact fraction on every platform."""

    outcomes: tuple[T, ...]
    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.outcomes) == len(self.weights) > 0 and min(self.weights) > 0

    @cached_property
    def cumulative(self) -> tuple[int, ...]:
        return tuple(accumulate(self.weights))

    @cached_property
    def log_probs(self) -> tuple[float, ...]:
        return tuple(math.log(weight / self.cumulative[-1]) for weight in self.weights)

    def draw(self, word: int) -> T:
        """The outcome that a uniform 64-bit `word` selects (probabilities are met to 2^-64 × the sum of weights)."""
        return self.outcomes[bisect_right(self.cumulative, word * self.cumulative[-1] >> 64)]


CERTAIN: Weighted[Any] = Weighted((None,), (1,))
"""The decision of a state that has nothing to decide."""


@dataclass(frozen=True, eq=False)
class Slot:
    """A role in the story. `given = (slot, form)` names the fact that selects the table; without it, "" does."""

    name: str
    tables: Mapping[str, Weighted[Entry]]
    given: tuple[str, str] | None = None

    def table(self, facts: Facts) -> Weighted[Entry]:
        return self.tables[facts[self.given[0]][self.given[1]] if self.given else ""]


@dataclass(frozen=True, eq=False)
class Say:
    """Fixed words."""

    text: str
    then: State

    def decision(self, facts: Facts) -> Weighted[Any]:
        return CERTAIN

    def advance(self, facts: Facts, outcome: None) -> tuple[str, State, Facts]:
        return self.text, self.then, facts


@dataclass(frozen=True, eq=False)
class Mention:
    """A slot in one of its forms: drawn the first time, repeated after that."""

    slot: Slot
    form: str
    then: State

    def decision(self, facts: Facts) -> Weighted[Any]:
        return CERTAIN if self.slot.name in facts else self.slot.table(facts)

    def advance(self, facts: Facts, outcome: Entry | None) -> tuple[str, State, Facts]:
        if outcome is None:
            return facts[self.slot.name][self.form], self.then, facts
        return outcome[self.form], self.then, {**facts, self.slot.name: outcome}


@dataclass(frozen=True, eq=False)
class Choose:
    """One of several ways to go on. They meet again in the state that follows the rule, so the graph stays small."""

    ways: Weighted[State]

    def decision(self, facts: Facts) -> Weighted[Any]:
        return self.ways

    def advance(self, facts: Facts, outcome: State) -> tuple[str, State, Facts]:
        return "", outcome, facts


State: TypeAlias = Say | Mention | Choose | None
"""A point inside a text; `None` is its end."""

_EMPTY: Facts = {}


def compile_grammar(rules: Rules, slots: Mapping[str, Slot], start: str) -> Grammar:
    """Compile the rules from `start` on. Recursive rules are not supported: they would have no acyclic graph."""

    def expand(rule: str, then: State) -> State:
        ways = tuple(sequence(template, then) for template in rules[rule])
        return ways[0] if len(ways) == 1 else Choose(Weighted(ways, tuple(rules[rule].values())))

    def sequence(template: str, then: State) -> State:
        # Built from the end, because a state holds the one that follows it.
        end = len(template)
        for match in reversed(list(_REFERENCE.finditer(template))):
            if match.end() < end:
                then = Say(template[match.end() : end], then)
            if match["rule"]:
                then = expand(match["rule"], then)
            else:
                then = Mention(slots[match["slot"]], match["form"] or DEFAULT_FORM, then)
            end = match.start()
        return Say(template[:end], then) if end else then

    return Grammar(expand(start, None))


@dataclass(frozen=True, eq=False)
class Grammar:
    """A distribution over texts, as an acyclic graph of states."""

    start: State

    def sample(self, key: bytes) -> str:
        """The text that `key` selects: a pure function, since all random bits are one SHAKE-128 stream of the key."""
        words = iter(struct.unpack(f"<{self.most_decisions}Q", shake_128(key).digest(8 * self.most_decisions)))
        said: list[str] = []
        state, facts = self.start, _EMPTY
        while state is not None:
            decision = state.decision(facts)
            outcome = None if decision is CERTAIN else decision.draw(next(words))
            text, state, facts = state.advance(facts, outcome)
            said.append(text)
        return "".join(said)

    def derivations(self, text: str) -> Iterator[float]:
        """The natural log-probability of each derivation of `text`: depth first, with an explicit stack."""
        stack: list[tuple[State, Facts, int, float]] = [(self.start, _EMPTY, 0, 0.0)]
        while stack:
            state, facts, at, log_p = stack.pop()
            if state is None:
                if at == len(text):
                    yield log_p
                continue
            decision = state.decision(facts)
            for outcome, log_q in zip(decision.outcomes, decision.log_probs, strict=True):
                said, then, known = state.advance(facts, outcome)
                if text.startswith(said, at):
                    stack.append((then, known, at + len(said), log_p + log_q))

    def log_prob(self, text: str) -> float:
        """Natural log of the probability of exactly this text; -inf when the grammar cannot say it."""
        return _log_sum_exp(list(self.derivations(text)))

    def fold(
        self, of_text: Callable[[str], float], of_decision: Callable[[Sequence[float], Sequence[float]], float]
    ) -> float:
        """Sum over all texts at once, exactly, without listing them.

        The value of a text is the sum of `of_text` over its pieces; `of_decision(log_probs, values)` joins the values
        of a decision's outcomes. States that meet again with equal *relevant* facts share their value: what matters of
        a fact is how its later mentions count, and whether a later draw depends on it. So 10^50 stories take a few
        thousand sums.
        """
        memo: dict[Any, float] = {}

        def value(state: State, facts: Facts) -> float:
            total = 0.0
            while state is not None:
                decision = state.decision(facts)
                if decision is not CERTAIN:
                    return total + decided(state, facts, decision)
                text, state, facts = state.advance(facts, None)
                total += of_text(text)
            return total

        def decided(state: Any, facts: Facts, decision: Weighted[Any]) -> float:
            mentions, conditions = self._relevant[state]
            key = (
                state,
                tuple(of_text(facts[slot][form]) if slot in facts else None for slot, form in mentions),
                tuple(facts[slot][form] if slot in facts else None for slot, form in conditions),
            )
            if key not in memo:
                values: list[float] = []
                for outcome in decision.outcomes:
                    text, then, known = state.advance(facts, outcome)
                    values.append(of_text(text) + value(then, known))
                memo[key] = of_decision(decision.log_probs, values)
            return memo[key]

        return value(self.start, _EMPTY)

    @cached_property
    def entropy(self) -> float:
        """Entropy of one text in nats (of its derivation, which is the same thing as long as no text has two)."""
        return self.fold(
            lambda _: 0.0, lambda logs, values: sum(math.exp(p) * (v - p) for p, v in zip(logs, values, strict=True))
        )

    @cached_property
    def collision_entropy(self) -> float:
        """Rényi entropy of order 2 in nats: two independent texts are equal with probability exp(-this)."""
        return -self.fold(
            lambda _: 0.0, lambda logs, values: _log_sum_exp([2 * p + v for p, v in zip(logs, values, strict=True)])
        )

    @cached_property
    def most_decisions(self) -> int:
        """How many decisions the longest derivation takes."""
        return int(self.fold(lambda _: 0.0, lambda _, values: 1 + max(values)))

    def expected(self, of_text: Callable[[str], float]) -> float:
        """Mean over texts of a quantity that adds up over their pieces."""
        return self.fold(of_text, lambda logs, values: sum(math.exp(p) * v for p, v in zip(logs, values, strict=True)))

    def least(self, of_text: Callable[[str], float]) -> float:
        """Smallest value over all texts of a quantity that adds up over their pieces."""
        return self.fold(of_text, lambda _, values: min(values))

    def pieces(self) -> Iterator[str]:
        """Every string that some state can say, repetitions included."""
        for state in self.states:
            if isinstance(state, Say):
                yield state.text
            elif isinstance(state, Mention):
                yield from (entry[state.form] for table in state.slot.tables.values() for entry in table.outcomes)

    @cached_property
    def states(self) -> tuple[Say | Mention | Choose, ...]:
        """All states but the end, each before those that can follow it."""
        done: dict[Say | Mention | Choose, None] = {}

        def visit(state: State) -> None:
            if state is not None and state not in done:
                for then in _following(state):
                    visit(then)
                done[state] = None

        visit(self.start)
        return tuple(reversed(done))

    @cached_property
    def _relevant(self) -> dict[State, tuple[_Forms, _Forms]]:
        """For each state, the forms of facts that later text repeats, and those that later draws depend on."""
        relevant: dict[State, tuple[_Forms, _Forms]] = {None: ((), ())}
        for state in reversed(self.states):
            mentions = {form for then in _following(state) for form in relevant[then][0]}
            conditions = {form for then in _following(state) for form in relevant[then][1]}
            if isinstance(state, Mention):
                mentions.add((state.slot.name, state.form))
                conditions |= {state.slot.given} if state.slot.given else set()
            relevant[state] = tuple(sorted(mentions)), tuple(sorted(conditions))
        return relevant


_Forms: TypeAlias = tuple[tuple[str, str], ...]


def _following(state: Say | Mention | Choose) -> tuple[State, ...]:
    return state.ways.outcomes if isinstance(state, Choose) else (state.then,)


def _log_sum_exp(logs: Sequence[float]) -> float:
    largest = max(logs, default=-math.inf)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(log - largest) for log in logs))
