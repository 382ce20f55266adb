"""How the benchmark calls each tokenizer: ours and its peers, each in the fastest way that its own interface has.

Nothing heavy is imported at the top: processes that measure the memory of one trainer import this file too.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from transformerlm.tokenizer.pretokenizer import PATTERNS

if TYPE_CHECKING:
    from transformerlm.tokenizer.tokenizer import Tokenizer

OURS = "transformerlm"
END_OF_TEXT = "<|endoftext|>"

Encode: TypeAlias = Callable[[str], Any]
Train: TypeAlias = Callable[[], object]

OTHER_IDS = ("sentencepiece",)
"""Peers that cannot take our vocabulary: their speed counts, their ids are others."""
WITHOUT_MEMORY = ("tokenizers", "tiktoken", "sentencepiece")
"""Peers that remember no words, so that warm is as cold."""


def installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# -- encoding ----------------------------------------------------------------------------------------------------------


def encoders(tokenizer: Tokenizer, directory: Path, text: str) -> dict[str, Callable[[], Encode]]:
    """For each tokenizer a function that makes a new encoder; `text` is for a peer that trains one of its own."""
    from transformerlm.tokenizer.tokenizer import Tokenizer

    makers: dict[str, Callable[[], Encode]] = {
        OURS: lambda: partial(Tokenizer(tokenizer.vocabulary).encode, allowed_special="none")
    }
    if tiktoken := installed("tiktoken"):
        makers["tiktoken"] = lambda: tiktoken_encoding(tiktoken, tokenizer).encode_ordinary
    if gigatoken := installed("gigatoken"):
        makers["gigatoken"] = lambda: gigatoken.Tokenizer(str(directory / "tokenizer.json")).encode
    if tokenizers := installed("tokenizers"):
        makers["tokenizers"] = partial(encode_with_tokenizers, tokenizers, directory / "tokenizer.json")
    if sentencepiece := installed("sentencepiece"):
        model = train_with_sentencepiece(sentencepiece, text[:5_000_000].splitlines(), tokenizer.vocab_size)
        makers["sentencepiece"] = partial(encode_with_sentencepiece, sentencepiece, model)
    return makers


def tiktoken_encoding(tiktoken: Any, tokenizer: Tokenizer) -> Any:
    return tiktoken.Encoding(
        name="benchmark",
        pat_str=PATTERNS[tokenizer.vocabulary.pattern],
        mergeable_ranks=dict(tokenizer.vocabulary.tokens),
        special_tokens={},
    )


def encode_with_tokenizers(tokenizers: Any, path: Path) -> Encode:
    encoder = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: encoder.encode(text, add_special_tokens=False).ids


def encode_with_sentencepiece(sentencepiece: Any, model: bytes) -> Encode:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    # In lines, which it prefers by far to one long text.
    return lambda text: processor.encode(text.splitlines(), num_threads=1)


# -- training ----------------------------------------------------------------------------------------------------------


def trainers(data: bytes, vocab_size: int) -> dict[str, Callable[[], Train]]:
    """For each tokenizer a function that gets the text ready in the form it takes, and returns the training."""
    found: dict[str, Callable[[], Train]] = {OURS: lambda: partial(train_with_ours, data, vocab_size)}
    if gigatoken := installed("gigatoken"):
        found["gigatoken"] = lambda: partial(gigatoken.train_bpe, data, vocab_size, [END_OF_TEXT])
    if rustbpe := installed("rustbpe"):
        found["rustbpe"] = lambda: partial(train_with_rustbpe, rustbpe, data.decode(), vocab_size)
    if tokenizers := installed("tokenizers"):
        found["tokenizers"] = lambda: partial(
            train_with_tokenizers, tokenizers, data.decode().splitlines(keepends=True), vocab_size
        )
    if sentencepiece := installed("sentencepiece"):
        found["sentencepiece"] = lambda: partial(
            train_with_sentencepiece, sentencepiece, data.decode().splitlines(), vocab_size
        )
    return found


def train_with_ours(data: bytes, vocab_size: int, threads: int = 1) -> None:
    from transformerlm.tokenizer.specs import TokenizerTrainingSpec
    from transformerlm.tokenizer.trainer import train_tokenizer

    spec = TokenizerTrainingSpec(vocab_size=vocab_size, special_tokens=(END_OF_TEXT,), allow_smaller=True)
    train_tokenizer([data], spec, threads=threads)


def train_with_rustbpe(rustbpe: Any, text: str, vocab_size: int) -> None:
    rustbpe.Tokenizer().train_from_iterator([text], vocab_size - 1, pattern=PATTERNS["gpt2"])


def train_with_tokenizers(tokenizers: Any, lines: list[str], vocab_size: int) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)


def train_with_sentencepiece(sentencepiece: Any, lines: list[str], vocab_size: int) -> bytes:
    """A BPE model with byte fallback that changes no text. It merges characters, so its ids are others than ours."""
    model = io.BytesIO()
    settings: Mapping[str, Any] = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "max_sentence_length": 1 << 24,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()
