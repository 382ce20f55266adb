"""The stories: what they promise to a model, and to a reader."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformerlm.corpus import stories
from transformerlm.corpus.plots import RULES
from transformerlm.corpus.stories import entropy, grammar, log_prob, sample, split_seed
from transformerlm.corpus.words import SLOTS, word

SEEDS = st.integers(0, 2**63 - 1)
INDICES = st.integers(0, 10**9)
STORY = st.builds(sample, SEEDS, INDICES)
NAMES = [entry["it"] for table in SLOTS["hero"].tables.values() for entry in table.outcomes]


@cache
def some_stories() -> list[str]:
    return [sample(split_seed(7, "train"), i) for i in range(2000)]


@given(SEEDS, INDICES)
def test_a_story_is_a_function_of_seed_and_index(seed: int, index: int) -> None:
    assert sample(seed, index) == sample(seed, index)
    assert sample(seed, index) != sample(seed, index + 1)
    assert sample(seed, index) != sample(seed + 1, index)


@given(STORY)
def test_a_story_has_one_derivation(story: str) -> None:
    assert len(list(grammar().derivations(story))) == 1
    assert -400 < log_prob(story) < 0


@given(STORY, st.data())
def test_a_hero_who_changes_the_name_is_impossible(story: str, data: st.DataObject) -> None:
    hero = next(name for name in re.findall(r"[A-Z][a-z]+", story) if name in NAMES)
    mentions = list(re.finditer(rf"\b{hero}\b", story))
    assert len(mentions) >= 2
    mention = data.draw(st.sampled_from(mentions))
    other = data.draw(st.sampled_from([name for name in NAMES if name != hero]))
    assert log_prob(story[: mention.start()] + other + story[mention.end() :]) == -math.inf


@given(STORY, st.data())
def test_a_wrong_pronoun_is_impossible(story: str, data: st.DataObject) -> None:
    wrong = {
        "he": "she",
        "she": "he",
        "him": "her",
        "his": "her",
        "her": "his",
        "He": "She",
        "She": "He",
        "His": "Her",
        "Her": "His",
    }
    pronouns = list(re.finditer(rf"\b({'|'.join(wrong)})\b", story))
    if pronouns:
        pronoun = data.draw(st.sampled_from(pronouns))
        assert log_prob(story[: pronoun.start()] + wrong[pronoun[0]] + story[pronoun.end() :]) == -math.inf


@given(STORY, st.data())
def test_no_part_of_a_story_is_a_story(story: str, data: st.DataObject) -> None:
    assert log_prob(story[: data.draw(st.integers(0, len(story) - 1))]) == -math.inf
    assert log_prob(story + data.draw(st.sampled_from([" ", ".", "\n", "The end."]))) == -math.inf


def test_the_entropy_is_the_mean_of_minus_log_prob() -> None:
    losses = [-log_prob(story) for story in some_stories()]
    mean = math.fsum(losses) / len(losses)
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    assert abs(mean - entropy()) < 4 * math.sqrt(variance / len(losses))


def test_every_story_has_eighty_words() -> None:
    def words(text: str) -> int:
        return len(re.findall(r"\s+", text))

    assert grammar().least(words) + 1 >= 80
    assert min(len(story.split()) for story in some_stories()) >= grammar().least(words) + 1
    assert grammar().expected(words) + 1 == pytest.approx(sum(len(s.split()) for s in some_stories()) / 2000, rel=0.01)


def test_the_vocabulary_is_large_and_is_used() -> None:
    seen = {word for story in some_stories() for word in re.findall(r"[a-z]+", story.lower())}
    assert len(stories.word_forms()) >= 1000
    assert seen <= stories.word_forms()
    assert len(seen) > 0.95 * len(stories.word_forms())


def test_entities_persist_through_the_story() -> None:
    for story in some_stories():
        words = re.findall(r"\w+", story)
        hero = next(word for word in words if word in NAMES)
        at = [position for position, word in enumerate(words) if word == hero]
        assert max(later - earlier for earlier, later in pairwise(at)) > 5
        assert at[-1] - at[0] > 30


def test_splits_do_not_meet() -> None:
    seeds = {split_seed(seed, split) for seed in range(100) for split in ("train", "val", "test")}
    assert len(seeds) == 300
    assert not {sample(split_seed(7, "val"), i) for i in range(2000)} & set(some_stories())
    # A billion stories of each split: the expected number of pairs that are equal.
    assert 1e18 * math.exp(-stories.collision_entropy()) < 1e-12


def test_every_rule_and_every_slot_is_used() -> None:
    templates = " ".join(template for rule in RULES.values() for template in rule)
    assert set(re.findall(r"\[([\w.]+)\]", templates)) == RULES.keys() - {"story"}
    assert set(re.findall(r"\{(\w+)", templates)) == SLOTS.keys()


def test_the_entries_of_a_slot_differ() -> None:
    for slot in SLOTS.values():
        for table in slot.tables.values():
            assert len({entry["it"] for entry in table.outcomes}) == len(table.outcomes), slot.name


def test_the_english_is_sound() -> None:
    for story in some_stories():
        assert story == story.strip()
        assert not re.search(r"\b[Aa] (?!uku|uni|use)[aeiou]|\b[Aa]n (?!honest)[^aeiou]", story), story
        assert not re.search(r" [,.!?]|  | \n|\n\n\n|[.,!?]{2}|[^ \n]\"\w", story), story
        assert not re.search(r"(?:^|\n|[.!?] )\"?[a-z]", story), story
        for paragraph in story.split("\n\n"):
            assert paragraph.count('"') % 2 == 0, story
            assert re.search(r'[.!?]"?$', paragraph), story


def test_articles() -> None:
    a = {it: word(it)["a"].split()[0] for it in ("owl", "dog", "unicorn", "uncle", "honest", "hen", "hour", "ukulele")}
    assert a == {
        "owl": "an",
        "dog": "a",
        "unicorn": "a",
        "uncle": "an",
        "honest": "an",
        "hen": "a",
        "hour": "an",
        "ukulele": "a",
    }
    assert word("owl")["A"] == "An owl"


def test_the_fingerprint_is_stable() -> None:
    script = "from transformerlm.corpus.stories import fingerprint; print(fingerprint())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == stories.fingerprint()


def test_the_corpus_loads_only_the_standard_library() -> None:
    script = (
        "import sys, transformerlm.corpus.stories as s; s.sample(0, 0); print({'torch', 'numpy'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
