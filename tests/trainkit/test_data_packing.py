"""From documents to windows, against the definition and against the best that any packing can do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain, count, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.document_order import Place
from trainkit.data.packing import FILL, Document, best_fit, concatenate, pack_best_fit, rows

EOT = 99
PLACE = Place()


def documents(lengths: list[int]) -> Iterator[Document]:
    """Documents with so many tokens, one and the same again and again; token i of document d is 1000 d + i."""
    for number, length in zip(count(), chain.from_iterable([lengths] * 1000), strict=False):
        yield Document(number, PLACE, np.append(1000 * (number + 1) + np.arange(length), EOT).astype(np.int32))


# -- bins --------------------------------------------------------------------------------------------------------------


def fewest_bins(sizes: list[int], capacity: int) -> int:
    """By trying everything."""
    best = len(sizes)

    def place(index: int, left: list[int]) -> None:
        nonlocal best
        if len(left) >= best:
            return
        if index == len(sizes):
            best = len(left)
            return
        for at in range(len(left)):
            if left[at] >= sizes[index]:
                place(index + 1, [*left[:at], left[at] - sizes[index], *left[at + 1 :]])
        place(index + 1, [*left, capacity - sizes[index]])

    place(0, [])
    return best


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=8))))
def test_bins_hold_everything_once_and_are_nearly_as_few_as_can_be(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    bins = pack_best_fit(sizes, capacity)
    assert sorted(chain.from_iterable(bins)) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in one) <= capacity for one in bins)
    assert len(bins) <= 11 / 9 * fewest_bins(sizes, capacity) + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_bins_are_those_of_a_search_through_all(sizes: list[int]) -> None:
    left: list[int] = []
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        fitting = [(room, at) for at, room in enumerate(left) if room >= sizes[index]]
        at = min(fitting)[1] if fitting else len(left)
        if at == len(left):
            left.append(50)
            bins.append([])
        left[at] -= sizes[index]
        bins[at].append(index)
    assert pack_best_fit(sizes, 50) == bins


# -- windows -----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12))
def test_concatenated_windows_are_cut_from_one_stream(lengths: list[int], length: int) -> None:
    stream, number = [EOT], [0]
    for document in islice(documents(lengths), 100):
        stream += document.tokens.tolist()
        number += [document.number + 1] * len(document.tokens)
    windows = concatenate(documents(lengths), 0, length=length, eot_id=EOT)
    for k, window in enumerate(islice(windows, 100 // length)):
        place = slice(k * length, k * length + length + 1)
        assert window.tokens.tolist() == stream[place]
        assert window.documents.tolist() == [n - number[k * length] for n in number[place]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(2, 20), st.integers(1, 12))
def test_best_fit_predicts_every_token_once_from_the_token_before_it(
    lengths: list[int], length: int, group: int
) -> None:
    given = list(islice(documents(lengths), 2 * group))
    expected = [[(t, d.number) for t in d.tokens.tolist()] for d in given]
    before = {t: p for d in given for p, t in zip([EOT, *d.tokens.tolist()], d.tokens.tolist(), strict=False)}
    windows = best_fit(documents(lengths), 0, length=length, eot_id=EOT, group_size=group, seed=3)
    for start in (0, group):
        wanted = sum(len(document) for document in expected[start : start + group])
        found: list[int] = []
        while len(found) < wanted:
            window = next(windows)
            assert window.after.document == start
            tokens, numbers = window.tokens.tolist(), window.documents.tolist()
            assert len(tokens) == length + 1 and numbers[0] == 0
            for at in range(1, length + 1):
                if numbers[at] == FILL:
                    continue
                found.append(tokens[at])
                if tokens[at] != EOT:
                    assert tokens[at - 1] == before[tokens[at]]
                if numbers[at] == numbers[at - 1] and tokens[at] != EOT:
                    assert tokens[at] == tokens[at - 1] + 1
            seen = [number for number in numbers if number != FILL]
            assert seen == sorted(seen) and set(seen) <= set(range(len(seen)))
        texts = expected[start : start + group]
        assert sorted(found) == sorted(token for document in texts for token, _ in document)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 18), min_size=1, max_size=12), st.integers(1, 12))
def test_best_fit_never_cuts_what_fits(lengths: list[int], group: int) -> None:
    windows = best_fit(documents(lengths), 0, length=20, eot_id=EOT, group_size=group, seed=3)
    for window in islice(windows, 20):
        for number in range(1, int(window.documents.max()) + 1):
            tokens = window.tokens[window.documents == number]
            assert tokens[0] % 1000 == 0 and tokens[-1] == EOT and (np.diff(tokens[:-1]) == 1).all()


def test_best_fit_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 2000).tolist()
    windows = best_fit(documents(lengths), 0, length=256, eot_id=EOT, group_size=512, seed=0)
    fill = np.stack([window.documents[1:] == FILL for window in islice(windows, 400)])
    assert fill.mean() < 0.02


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12))
def test_a_row_is_one_document(lengths: list[int], length: int) -> None:
    for document, window in zip(
        documents(lengths), islice(rows(documents(lengths), 0, length=length, eot_id=EOT), 10), strict=False
    ):
        kept = document.tokens[:length].tolist()
        fill = length - len(kept)
        assert window.tokens.tolist() == [EOT, *kept, *[EOT] * fill]
        assert window.documents.tolist() == [0, *[1] * len(kept), *[FILL] * fill]


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["concatenate", "best_fit", "rows"]), st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1)
)
def test_windows_go_on_from_any_position(packing: str, done: int, lengths: list[int]) -> None:
    pack = {
        "concatenate": concatenate,
        "best_fit": partial(best_fit, group_size=5, seed=1),
        "rows": rows,
    }[packing]
    windows = list(islice(pack(documents(lengths), 0, length=16, eot_id=EOT), done + 5))
    after = windows[done - 1].after
    rest = pack(islice(documents(lengths), after.document, None), after.offset, length=16, eot_id=EOT)
    for ours, other in zip(windows[done:], rest, strict=False):
        assert ours.tokens.tolist() == other.tokens.tolist() and ours.documents.tolist() == other.documents.tolist()
        assert ours.after == other.after


def test_the_windows_of_a_group_are_not_sorted_by_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 64).tolist()
    windows = islice(best_fit(documents(lengths), 0, length=64, eot_id=EOT, group_size=64, seed=0), 20)
    longest = [np.unique(window.documents, return_counts=True)[1].max() for window in windows]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_windows_of_almost_nothing(length: int) -> None:
    for window in islice(best_fit(documents([4]), 0, length=length, eot_id=EOT, group_size=2, seed=0), 30):
        assert len(window.tokens) == length + 1
