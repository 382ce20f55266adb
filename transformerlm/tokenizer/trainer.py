"""Learn merges from text: count words once, then merge the most frequent pair of neighbours, again and again.

Memory is bounded by the number of distinct words, not by the length of the corpus, and that number can be bounded too.
A merge touches only the words that hold its pair, and pair counts are kept up to date instead of being counted anew.

This file does it in plain Python, which serves small corpora, and hands over to the compiled kernels
(`compiled_trainer.py`, the same merges) once there is enough text for them to pay.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING

from trainkit.errors import EXIT_USAGE, UserError
from transformerlm.tokenizer import readiness
from transformerlm.tokenizer.pretokenizer import as_text, pretokenize, to_bytes
from transformerlm.tokenizer.special_tokens import SpecialTokens, split_special
from transformerlm.tokenizer.specs import PatternName, TokenizerTrainingSpec
from transformerlm.tokenizer.streams import batches
from transformerlm.tokenizer.tokenizer import Tokenizer, num_cores
from transformerlm.tokenizer.vocabulary import BYTES, Merge, check_special_tokens, trained_vocabulary

if TYPE_CHECKING:
    from transformerlm.tokenizer.compiled_trainer import WordCounter

Progress = Callable[[str, int], None]
"""Called as `progress("count", documents read so far)`, `progress("merge", merges learned so far)`, and, where
`max_words` made it drop words, `progress("dropped", occurrences of dropped words so far)`."""

Pair = tuple[int, int]

KERNELS = "compiled_trainer"
LOT = 1 << 24
"""Characters that are counted at a time. Fixed, so that what `max_words` drops does not depend on the threads."""
TRAINING_WORK = 10
"""How much longer the plain path takes to train on a text than to encode it."""


def _silent(stage: str, done: int) -> None:
    del stage, done


def train_tokenizer(
    texts: Iterable[str | bytes], spec: TokenizerTrainingSpec, *, progress: Progress = _silent, threads: int = 0
) -> Tokenizer:
    """Train on `texts`, which are read once and not kept, with some `threads` (0 = all cores).

    The result depends on the multiset of words alone: not on the order of the texts, nor on hashing or threads. (With
    `spec.max_words` it depends on which words were rare when there were too many.) Raises `UserError` when the settings
    contradict themselves, when there is no text, or when it cannot yield enough merges.
    """
    if isinstance(texts, str | bytes):  # it is an iterable too, of characters
        raise UserError("train_tokenizer was given one text: pass an iterable of texts, such as [text]")
    num_merges = wanted_merges(spec)
    merges = _count_and_learn(texts, spec, num_merges, progress, threads or num_cores())
    if len(merges) < num_merges and not spec.allow_smaller:
        reached = spec.vocab_size - num_merges + len(merges)
        raise UserError(
            f"the corpus yields only {len(merges)} of {num_merges} merges; give more text, "
            f"or set tokenizer.vocab_size = {reached}, or tokenizer.allow_smaller = true"
        )
    return Tokenizer(trained_vocabulary(merges, spec.special_tokens, spec.pattern))


def _count_and_learn(
    texts: Iterable[str | bytes], spec: TokenizerTrainingSpec, num_merges: int, progress: Progress, threads: int
) -> list[Merge]:
    special = SpecialTokens(dict.fromkeys(spec.special_tokens, 0), frozenset())
    words: PlainCounter | WordCounter = PlainCounter(special, spec.pattern)
    documents = dropped = 0
    for batch in batches(texts, LOT, LOT):
        work = TRAINING_WORK * sum(map(len, batch))
        if isinstance(words, PlainCounter) and readiness.pays(KERNELS, work):
            counted = words.words()
            words = readiness.load(KERNELS).WordCounter(special, threads, spec.pattern)
            assert not isinstance(words, PlainCounter)
            words.count_words(counted)
        words.count(batch)
        documents += len(batch)
        progress("count", documents)
        if 0 < spec.max_words < len(words):
            dropped += words.drop_rare(spec.max_words)
            progress("dropped", dropped)
    if not len(words):
        raise UserError("the corpus for the tokenizer is empty; give it files that hold text")
    if isinstance(words, PlainCounter):
        return learn_merges(words.words(), num_merges, progress=progress)
    nodes, counts = words.table.nodes()
    del words  # the table's memory is wanted for the merges
    return readiness.load(KERNELS).learn_merges(nodes, counts, num_merges, progress)


def wanted_merges(spec: TokenizerTrainingSpec) -> int:
    """How many merges fill the vocabulary; raises `UserError` on settings that cannot be met."""
    try:
        check_special_tokens(spec.special_tokens, "tokenizer.special_tokens")
    except UserError as error:
        raise UserError(str(error), EXIT_USAGE) from error
    smallest = len(BYTES) + len(spec.special_tokens)
    if spec.vocab_size < smallest:
        raise UserError(
            f"tokenizer.vocab_size = {spec.vocab_size} is too small: 256 bytes and {len(spec.special_tokens)} special "
            f"tokens need at least {smallest}",
            EXIT_USAGE,
        )
    return spec.vocab_size - smallest


class PlainCounter:
    """How often each pre-token occurs; special tokens divide the text and are not counted."""

    def __init__(self, special: SpecialTokens, pattern: PatternName = "gpt2") -> None:
        self._pattern: PatternName = pattern
        self.counts: Counter[str] = Counter()
        self._special = special

    def __len__(self) -> int:
        return len(self.counts)

    def count(self, texts: Iterable[str | bytes]) -> None:
        for text in map(as_text, texts):
            for start, end, _ in split_special(text, self._special.names):
                for words in pretokenize(text, start, end, self._pattern):
                    self.counts.update(words)

    def drop_rare(self, most: int) -> int:
        """Drop the rarest words, all of one count or none, until at most `most` are left; returns their occurrences."""
        smallest = sorted(self.counts.values(), reverse=True)[most] + 1
        rare = sum(count for count in self.counts.values() if count < smallest)
        self.counts = Counter({word: count for word, count in self.counts.items() if count >= smallest})
        return rare

    def words(self) -> Counter[bytes]:
        return Counter({to_bytes(word): count for word, count in self.counts.items()})


def count_words(texts: Iterable[str | bytes], special_tokens: Iterable[str] = ()) -> Counter[bytes]:
    """How often each pre-token of `texts` occurs."""
    counter = PlainCounter(SpecialTokens(dict.fromkeys(special_tokens, 0), frozenset()))
    counter.count(texts)
    return counter.words()


def learn_merges(words: Mapping[bytes, int], num_merges: int, *, progress: Progress = _silent) -> list[Merge]:
    """Up to `num_merges` merges, fewer when every word has become one token.

    Each merge takes the pair with the largest count over all words, and of equals the lexicographically greatest pair
    of byte strings.
    """
    tokens = list(BYTES)
    inverted = [_inverted(token) for token in tokens]
    sequences = [list(word) for word in words]
    frequencies = list(words.values())
    counts, places = _count_pairs(sequences, frequencies)
    # The best pair is the least entry. Counts only fall once a pair's younger token has been made, so an entry may
    # promise too much but never too little: it is corrected when it comes to the top.
    queue = [(-count, inverted[left], inverted[right], left, right) for (left, right), count in counts.items()]
    heapify(queue)
    merges: list[Merge] = []
    while queue and len(merges) < num_merges:
        negative, left_key, right_key, left, right = heappop(queue)
        count = counts[left, right]
        if count != -negative:
            if count > 0:
                heappush(queue, (-count, left_key, right_key, left, right))
            continue
        merged = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        inverted.append(_inverted(tokens[merged]))
        merges.append((tokens[left], tokens[right]))
        changes: Counter[Pair] = Counter()
        for place in places.pop((left, right)):
            _merge_in_word(sequences[place], left, right, merged, frequencies[place], changes)
            for pair in pairwise(sequences[place]):
                if merged in pair:
                    places[pair].add(place)
        for pair, change in changes.items():
            counts[pair] += change
            if merged in pair and counts[pair] > 0:
                heappush(queue, (-counts[pair], inverted[pair[0]], inverted[pair[1]], *pair))
        progress("merge", len(merges))
    return merges


def _count_pairs(sequences: list[list[int]], frequencies: list[int]) -> tuple[Counter[Pair], dict[Pair, set[int]]]:
    """How often each pair of neighbours occurs, and the numbers of the words that hold it (or have held it)."""
    counts: Counter[Pair] = Counter()
    places: dict[Pair, set[int]] = defaultdict(set)
    for place, (sequence, frequency) in enumerate(zip(sequences, frequencies, strict=True)):
        for pair in pairwise(sequence):
            counts[pair] += frequency
            places[pair].add(place)
    return counts, places


def _merge_in_word(
    sequence: list[int], left: int, right: int, merged: int, frequency: int, changes: Counter[Pair]
) -> None:
    """Replace `left right` by `merged` in `sequence`, from left to right, and note how pair counts change."""
    result: list[int] = []
    position = 0
    while position < len(sequence):
        if position + 1 < len(sequence) and sequence[position] == left and sequence[position + 1] == right:
            result.append(merged)
            position += 2
        else:
            result.append(sequence[position])
            position += 1
    if len(result) < len(sequence):
        for pair in pairwise(sequence):
            changes[pair] -= frequency
        for pair in pairwise(result):
            changes[pair] += frequency
        sequence[:] = result


def _inverted(token: bytes) -> str:
    """A key that sorts the other way round than `token`: the least key is the greatest byte string.

    Complemented bytes alone would still put a prefix first; the end mark, above every byte, puts it last.
    """
    return "".join(chr(255 - value) for value in token) + "\u0100"
