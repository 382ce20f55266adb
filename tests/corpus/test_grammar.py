"""The formalism against brute force: on small grammars every text can be listed."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformerlm.corpus.grammar import Entry, Facts, Grammar, Rules, Slot, Weighted, compile_grammar

SLOTS = {
    slot.name: slot
    for slot in (
        Slot("kind", {"": Weighted(({"it": "girl"}, {"it": "boy"}), (2, 1))}),
        Slot(
            "hero",
            {
                "girl": Weighted(({"it": "Ann", "they": "she"}, {"it": "Anna", "they": "she"}), (3, 1)),
                "boy": Weighted(({"it": "Bo", "they": "he"},), (1,)),
            },
            given=("kind", "it"),
        ),
        Slot("toy", {"": Weighted(({"it": "ball", "a": "a red ball"}, {"it": "owl", "a": "an owl"}), (4, 3))}),
    )
}
RULES: Rules = {
    "story": {"A {kind}, {hero}, [has]. {hero.they} [end]": 1},
    "has": {"had {toy.a}": 2, "saw {toy.a} and the {toy}": 1, "slept": 1},
    "end": {"laughed.": 5, "lost the {toy}, [end2]": 2},
    "end2": {"and cried.": 1, "so {hero} cried.": 1},
}


def tell(rules: Rules, template: str, facts: Facts) -> Iterator[tuple[str, Fraction, Facts]]:
    """Every derivation of a template, straight from its text: what the compiled graph is checked against."""
    match = re.search(r"\[(\w+)\]|\{(\w+)\.?(\w*)\}", template)
    if match is None:
        yield template, Fraction(1), facts
        return
    before, after = template[: match.start()], template[match.end() :]
    ways: list[tuple[str, Fraction, Facts]] = []
    if match[1]:
        total = sum(rules[match[1]].values())
        for way, weight in rules[match[1]].items():
            ways += [(said, p * Fraction(weight, total), known) for said, p, known in tell(rules, way, facts)]
    else:
        slot, form = SLOTS[match[2]], match[3] or "it"
        if slot.name in facts:
            ways.append((facts[slot.name][form], Fraction(1), facts))
        else:
            table = slot.tables[facts[slot.given[0]][slot.given[1]] if slot.given else ""]
            for entry, weight in zip(table.outcomes, table.weights, strict=True):
                ways.append((entry[form], Fraction(weight, sum(table.weights)), {**facts, slot.name: entry}))
    for said, p, known in ways:
        for rest, q, end in tell(rules, after, known):
            yield before + said + rest, p * q, end


def compiled(rules: Rules) -> Grammar:
    return compile_grammar(rules, SLOTS, start="story")


PIECES = ("a", "b", "ab ", "{kind}", "{hero}", "{hero.they}", "{toy}", "{toy.a}")


@st.composite
def any_rules(draw: st.DrawFn) -> Rules:
    """Random rules; most are ambiguous, and slots are first mentioned here or there."""

    def ways(pieces: tuple[str, ...], size: int, start: str = "") -> dict[str, int]:
        template = st.lists(st.sampled_from(pieces), max_size=size).map(lambda items: start + "".join(items))
        return draw(st.dictionaries(template, st.integers(1, 5), min_size=1, max_size=2))

    return {
        "story": ways((*PIECES, "[one]", "[two]"), 3, start="{kind} "),
        "one": ways((*PIECES, "[two]"), 2),
        "two": ways(PIECES, 2),
    }


def check_against_brute_force(rules: Rules) -> None:
    derivations = list(tell(rules, "[story]", {}))
    texts: dict[str, Fraction] = defaultdict(Fraction)
    for text, p, _ in derivations:
        texts[text] += p
    grammar = compiled(rules)

    assert sum(texts.values()) == 1
    for text, p in texts.items():
        assert grammar.log_prob(text) == pytest.approx(math.log(p), abs=1e-12)
    assert math.fsum(math.exp(grammar.log_prob(text)) for text in texts) == pytest.approx(1, abs=1e-12)
    assert Counter(text for text, _, _ in derivations) == {text: len(list(grammar.derivations(text))) for text in texts}

    assert grammar.entropy == pytest.approx(-sum(float(p) * math.log(p) for _, p, _ in derivations), abs=1e-12)
    assert grammar.collision_entropy == pytest.approx(-math.log(sum(p * p for _, p, _ in derivations)), abs=1e-12)
    assert grammar.expected(len) == pytest.approx(float(sum(p * len(text) for text, p, _ in derivations)), abs=1e-9)
    assert grammar.least(len) == min(map(len, texts))


def test_a_small_grammar_equals_its_enumeration() -> None:
    check_against_brute_force(RULES)
    assert all(sum(1 for _ in compiled(RULES).derivations(text)) == 1 for text, _, _ in tell(RULES, "[story]", {}))


@given(any_rules())
def test_random_grammars_equal_their_enumeration(rules: Rules) -> None:
    check_against_brute_force(rules)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A girl, Ann, slept. she laughed",
        "A girl, Ann, slept. she laughed. ",
        "A girl, Ann, slept. he laughed.",
        "A girl, Bo, slept. he laughed.",
        "A girl, Ann, had an owl. she lost the ball, and cried.",
        "A girl, Ann, had an owl. she lost the owl, so Anna cried.",
    ],
)
def test_what_the_grammar_cannot_say_has_no_probability(text: str) -> None:
    assert compiled(RULES).log_prob(text) == -math.inf


def test_samples_follow_the_distribution() -> None:
    grammar, n = compiled(RULES), 20_000
    seen = Counter(grammar.sample(b"%d" % i) for i in range(n))
    expected = {text: n * math.exp(grammar.log_prob(text)) for text, _, _ in tell(RULES, "[story]", {})}
    assert seen.keys() <= expected.keys()
    chi_squared = sum((seen[text] - mean) ** 2 / mean for text, mean in expected.items())
    degrees = len(expected) - 1
    assert abs(chi_squared - degrees) < 4 * math.sqrt(2 * degrees)


def test_samples_are_the_same_everywhere() -> None:
    grammar = compiled(RULES)
    assert [grammar.sample(key) for key in (b"0", b"1", b"2")] == [
        "A girl, Ann, had a red ball. she laughed.",
        "A girl, Anna, had a red ball. she lost the ball, so Anna cried.",
        "A girl, Ann, had an owl. she laughed.",
    ]


def test_a_word_selects_outcomes_in_proportion_to_their_weights() -> None:
    dice: Weighted[Entry] = Weighted(({"it": "x"}, {"it": "y"}, {"it": "z"}), (1, 2, 1))
    quarter = 1 << 62
    words = (0, quarter - 1, quarter, 3 * quarter - 1, 3 * quarter, 4 * quarter - 1)
    assert [dice.draw(word)["it"] for word in words] == ["x", "x", "y", "y", "z", "z"]
