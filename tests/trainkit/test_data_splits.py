"""Held-out documents: disjoint, exhaustive and stable when the data grow; cutting, and beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.document_sets import ShardedDocuments
from trainkit.data.splits import Split, cut, first, iterate, joined, only, pieces, split_of

SPLITS: tuple[Split, ...] = ("train", "val", "test")
texts = st.lists(st.text(max_size=8), max_size=30)
fractions = st.tuples(st.floats(0, 0.5), st.floats(0, 0.49))


@dataclass(frozen=True)
class Held:
    """A shard in memory."""

    texts: Sequence[str]

    def read(self, start: int) -> Iterator[str]:
        return iter(self.texts[start:])


@dataclass(frozen=True)
class Listed:
    """Documents by their number."""

    texts: Sequence[str]
    identity: str = "listed"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int, /) -> str:
        return self.texts[index]


def sharded(texts: Sequence[str], size: int = 7) -> ShardedDocuments:
    return ShardedDocuments([Held(texts[start : start + size]) for start in range(0, len(texts), size)], "sharded")


@given(texts, fractions)
def test_splits_are_disjoint_and_exhaustive(documents: list[str], shares: tuple[float, float]) -> None:
    for view in (sharded(documents), Listed(documents)):
        found = {split: list(iterate(only(view, split, *shares))) for split in SPLITS}
        assert sorted(text for split in SPLITS for text in found[split]) == sorted(filter(None, documents))
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not set(found[one]) & set(found[other])  # equal texts included


@given(texts, texts, fractions)
def test_data_that_grow_or_move_keep_their_split(old: list[str], new: list[str], shares: tuple[float, float]) -> None:
    before = {text: split_of(text, *shares) for text in old}
    merged = [text for pair in zip(new, old, strict=False) for text in pair] + old
    for split in SPLITS:
        assert {text for text in iterate(only(sharded(merged), split, *shares)) if text in before} == {
            text for text, where in before.items() if where == split and text
        }


@given(st.text(), fractions, fractions)
def test_a_larger_share_only_adds(text: str, small: tuple[float, float], more: tuple[float, float]) -> None:
    large = tuple(max(a, b) for a, b in zip(small, more, strict=True))
    held = split_of(text, *small)
    assert held == "train" or split_of(text, large[0], large[1]) == held


def test_shares_are_what_was_asked_for() -> None:
    found = [split_of(f"document {index}", 0.1, 0.2) for index in range(20_000)]
    assert abs(found.count("val") - 2000) < 200 and abs(found.count("test") - 4000) < 300


@given(texts, st.integers(0, 40), st.integers(0, 40))
def test_views_read_from_anywhere(documents: list[str], count: int, start: int) -> None:
    """A view's documents from number n on are those of the whole view without the first n."""
    views = [
        only(sharded(documents), "train", 0.3, 0.1),
        first(sharded(documents), count),
        cut(sharded(documents), 3),
        joined([sharded(documents), sharded(documents, 4)]),
    ]
    for view in views:
        assert isinstance(view, ShardedDocuments)
        for shard in view.shards:
            whole = list(shard.read(0))
            assert list(shard.read(start)) == whole[start:]
    assert len({view.identity for view in views}) == len(views)


@given(texts, st.integers(0, 40))
def test_the_first_documents(documents: list[str], count: int) -> None:
    for view in (sharded(documents), Listed(documents)):
        assert list(iterate(first(view, count))) == [text for text in documents[:count] if text]


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 40))
def test_pieces_add_up_and_fit(text: str, characters: int) -> None:
    parts = list(pieces(text, characters))
    assert "".join(parts) == text
    assert all(len(part) <= characters for part in parts) and all(parts[:-1])


def test_pieces_end_where_a_reader_would_pause() -> None:
    assert list(pieces("one two\n\nthree four five", 12)) == ["one two\n\n", "three four ", "five"]
