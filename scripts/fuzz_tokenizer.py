"""Look for texts and files on which the tokenizer's two paths differ, or which it does not survive.

    uv run python scripts/fuzz_tokenizer.py --minutes 30

Texts: ids of the compiled kernels against those of the plain path, for each pattern, any special tokens, any number of
threads, as one text and as a batch, and back to the same bytes. Words counted for training and merges learned likewise.
Files: any damage to a valid file must be a `UserError` or a tokenizer that works. A text that fails is kept in a file,
which is printed with the seed and the round that lead to it.

Inputs are made by mutation of what has been interesting before: an input is kept when it makes the plain path match an
alternative of the pattern after another one in a combination not seen yet.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from trainkit.errors import UserError
from transformerlm.tokenizer import compiled_encoder, compiled_trainer, readiness, tokenizer, trainer
from transformerlm.tokenizer.plain import PlainEncoder
from transformerlm.tokenizer.pretokenizer import as_text, pretokenize
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.specs import PatternName, TokenizerTrainingSpec
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import PlainCounter, train_tokenizer

SPECIAL = ("<|endoftext|>", "<|endoftext|>more", "<|pad|>", "a b", "中文")
LETTERS_AND_SYMBOLS = "a b Z é ß я 中 가 𝔸 ǅ ʰ ª ٣ ² ½ Ⅷ 𝟙 - _ € 😀 / ſ <| |> 's 'S 'll 'Ve 're '' don't the the"
SPACES_AND_MARKS = " \n\r\t\x0b\x1c\x85\xa0\u1680\u2003\u2028\u3000\u0301\u0903\u200b\ufeff\u0378\U0010ffff"
PIECES = [
    *(piece.encode() for piece in (*SPECIAL, *LETTERS_AND_SYMBOLS.split(), *SPACES_AND_MARKS)),
    *(
        b"  ",
        b"\r\n",
        b" \n ",
        b"123",
        b"\xff",
        b"\xc3",
        b"\xe4\xb8",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\xf4\x90\x80\x80",
    ),
]
PATTERNS: tuple[PatternName, ...] = ("gpt2", "cl100k", "o200k")
MOST_KEPT = 5000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in ("compiled_encoder", "compiled_trainer"):
        readiness.load(name)
    tokenizer.SHORT_TEXT = -1
    rng = random.Random(arguments.seed)
    tokenizers = [trained(pattern) for pattern in PATTERNS]
    kept, seen = list(PIECES), set[int]()
    end = time.monotonic() + 60 * arguments.minutes
    rounds = 0
    while time.monotonic() < end:
        text = mutated(rng, kept)
        subject = rng.choice(tokenizers)
        if is_new(text, subject.vocabulary.pattern, seen) and len(kept) < MOST_KEPT:
            kept.append(text)
        try:
            check_text(rng, text, kept, subject)
            if rounds % 20 == 0:
                check_training(rng, text, kept, subject.vocabulary.pattern)
                check_damaged_file(rng, subject)
        except BaseException:
            with tempfile.NamedTemporaryFile(prefix="fuzz-tokenizer-", delete=False) as file:
                file.write(text)
            print(f"seed {arguments.seed}, round {rounds}, pattern {subject.vocabulary.pattern}: {file.name}")
            raise
        rounds += 1
    print(f"{rounds:,} rounds, {len(kept):,} inputs kept, nothing found")


def trained(pattern: PatternName) -> Tokenizer:
    corpus = [b"".join(PIECES * 5).decode("utf-8", "surrogateescape"), "the cat's hat 12345 don't they're \n\n  x" * 50]
    spec = TokenizerTrainingSpec(vocab_size=700, special_tokens=SPECIAL, pattern=pattern, allow_smaller=True)
    return train_tokenizer(corpus, spec)


def mutated(rng: random.Random, kept: list[bytes]) -> bytes:
    text = bytearray(rng.choice(kept))
    for _ in range(rng.choice([1, 2, 4, 8, 32])):
        place = rng.randrange(len(text) + 1)
        match rng.randrange(6):
            case 0:
                text[place:place] = rng.choice(PIECES)
            case 1:
                text[place:place] = rng.choice(kept)
            case 2:
                text[place : place + rng.randrange(1, 9)] = b""
            case 3:
                text[place:place] = bytes([rng.randrange(256)])
            case 4:
                text[place:place] = rng.choice(PIECES) * rng.choice([2, 16, 62, 63, 64, 65, 130])
            case _:
                text[place:place] = chr(rng.choice([rng.randrange(0x3000), rng.randrange(0xE000, 0x110000)])).encode()
    return bytes(text[:20_000])


def is_new(text: bytes, pattern: PatternName, seen: set[int]) -> bool:
    """Whether two neighbouring pre-tokens are of kinds, and at places in a block, that have not met before."""
    words = [word for words in pretokenize(as_text(text), pattern=pattern) for word in words]
    place = 0
    before = len(seen)
    for one, other in pairwise(words[:200]):
        place += len(one)
        seen.add(hash((pattern, shape(one), shape(other), place % 64)))
    return len(seen) > before


def shape(word: str) -> tuple[str, str, int]:
    kinds = [
        "a" if character.isalpha() else "1" if character.isnumeric() else "s" if character.isspace() else "-"
        for character in (word[0], word[-1])
    ]
    return kinds[0], kinds[1], min(len(word.encode("utf-8", "surrogateescape")), 18)


def check_text(rng: random.Random, text: bytes, kept: list[bytes], subject: Tokenizer) -> None:
    special = subject._special(rng.choice(["all", "none", {"<|pad|>", "a b"}]), "none")
    texts = [text, *(rng.choice(kept) for _ in range(rng.randrange(4)))]
    plain = PlainEncoder(subject.vocabulary)
    expected = [list(plain.encode(one, special)) for one in texts]
    compiled_encoder.SMALLEST_PART = rng.choice([10, 100, 1000])
    compiled = (
        subject._compiled
        if rng.random() < 0.9
        else compiled_encoder.CompiledEncoder(subject.vocabulary, np.dtype(rng.choice([np.uint16, np.uint32])))
    )
    threads = rng.choice([1, 1, 1, 2, 4])
    for one, ids in zip(texts, expected, strict=True):
        found = compiled.encode(one, special, threads)
        assert found.tolist() == ids
        assert subject.decode_bytes(found) == one
    assert [ids.tolist() for ids in compiled.encode_batch(texts, special, threads)] == expected


def check_training(rng: random.Random, text: bytes, kept: list[bytes], pattern: PatternName) -> None:
    texts = [text, *(rng.choice(kept) for _ in range(rng.randrange(4)))]
    special = SpecialTokens(dict.fromkeys(SPECIAL, 0), frozenset())
    compiled_trainer.PART = rng.choice([50, 1000, 1 << 20])
    plain, compiled = PlainCounter(special, pattern), compiled_trainer.WordCounter(special, rng.choice([1, 2]), pattern)
    plain.count(texts)
    compiled.count(texts)
    assert len(plain) == len(compiled)
    expected = trainer.learn_merges(plain.words(), 60)
    assert compiled_trainer.learn_merges(*compiled.table.nodes(), 60, lambda stage, done: None) == expected


def check_damaged_file(rng: random.Random, subject: Tokenizer) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "tokenizer"
        subject.save(directory)
        (directory / "manifest.json").unlink()
        victim = rng.choice(sorted(directory.iterdir()))
        data = bytearray(victim.read_bytes())
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.choice([1, 10, 1000])]
                case 2:
                    data[place:place] = rng.choice([b"\n", b'"', b"{", b",", b" ", b"0", bytes([rng.randrange(256)])])
                case _:
                    data[place:place] = data[place : place + rng.choice([1, 20, 200])]
        victim.write_bytes(data)
        try:
            if victim.suffix == ".tiktoken":
                pattern = subject.vocabulary.pattern
                read = Tokenizer.from_tiktoken(victim, pattern=pattern, special_tokens=subject.special_tokens)
            else:
                read = Tokenizer.load(victim if victim.name == "tokenizer.json" else directory)
        except UserError as error:
            assert "\n" not in str(error)
            return
        text = json.dumps(subject.special_tokens) + "the cat's hat 123 é中 \n\n x"
        assert read.decode(read.encode(text, allowed_special="none")) == text


if __name__ == "__main__":
    main()
