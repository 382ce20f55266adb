"""A proof that no story has two derivations, without listing stories.

Two derivations of one text part at some decision and agree on the text from there on. So we follow each pair of
outcomes of each decision for as long as the text of one can be a prefix of the other's. If every pair falls out before
the two meet again in one state with equal text, each text has one derivation. The search is on the safe side: it knows
no facts, and lets each mention of a slot be any of its entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from transformerlm.corpus.grammar import Choose, Grammar, Mention, Rules, Say, Slot, State, compile_grammar
from transformerlm.corpus.stories import grammar
from transformerlm.corpus.words import ranked, word

Branch = tuple[str, State]


def branches(state: Any) -> Iterator[Branch]:
    """Every way on from a state: what it says, and what follows."""
    match state:
        case Say(text, then):
            yield text, then
        case Choose(ways):
            yield from (("", way) for way in ways.outcomes)
        case Mention(slot, form, then):
            yield from ((entry[form], then) for table in slot.tables.values() for entry in table.outcomes)


def decisions(grammar: Grammar) -> list[State]:
    """The states that can have something to decide: choices, and mentions of a slot that may still be open there."""
    settled: dict[State, set[str]] = {grammar.start: set()}
    for state in grammar.states:
        here = settled[state] | ({state.slot.name} if isinstance(state, Mention) else set())
        for _, then in branches(state):
            settled[then] = settled[then] & here if then in settled else here
    return [
        state
        for state in grammar.states
        if isinstance(state, Choose) or (isinstance(state, Mention) and state.slot.name not in settled[state])
    ]


def ambiguous(grammar: Grammar) -> list[tuple[str, str]]:
    """Pairs of outcomes of one decision that can come to one state with the same text."""
    cleared: set[tuple[str, State, State]] = (
        set()
    )  # pairs of branches that have been followed, by what the first is ahead

    def meet(first: Branch, second: Branch) -> bool:
        ahead, behind = (first, second) if len(first[0]) >= len(second[0]) else (second, first)
        if not ahead[0].startswith(behind[0]):
            return False
        lead = ahead[0].removeprefix(behind[0])
        if not lead and ahead[1] is behind[1]:
            return True
        if (key := (lead, ahead[1], behind[1])) in cleared:
            return False
        cleared.add(key)
        return any(meet((lead, ahead[1]), following) for following in branches(behind[1]))

    return [
        (first[0], second[0])
        for state in decisions(grammar)
        for first, second in combinations(branches(state), 2)
        if meet(first, second)
    ]


def test_no_story_has_two_derivations() -> None:
    assert ambiguous(grammar()) == []


@pytest.mark.parametrize(
    ("rules", "suspicious"),
    [
        ({"s": {"[x] end": 1}, "x": {"a": 1, "a b": 1}}, False),
        ({"s": {"[x][x]": 1}, "x": {"a": 1, "aa": 1}}, True),
        ({"s": {"the {animal}[x]": 1}, "x": {" ran": 1, "s ran": 1}}, True),
        ({"s": {"the {animal} sat. [x]": 1}, "x": {"The {animal} slept.": 1, "The {animal} ate.": 1}}, False),
        # On the safe side: the second sentence tells them apart, but only a search that knows the facts can see it.
        ({"s": {"the {animal.kind} sat. The {animal} slept.": 1}}, True),
    ],
)
def test_the_search_tells_them_apart(rules: Rules, suspicious: bool) -> None:
    animals = ranked([word("cat", kind="pet"), word("cats", kind="pet")])
    found = ambiguous(compile_grammar(rules, {"animal": Slot("animal", {"": animals})}, start="s"))
    assert bool(found) is suspicious
