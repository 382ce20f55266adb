"""Read and write vocabularies: GPT-2's files, Hugging Face's `tokenizer.json`, and (write only) tiktoken's ranks.

A tokenizer directory holds the same vocabulary in each form, so that other tools load it with identical ids:

- `vocab.json`, `merges.txt`: GPT-2's; `vocab.json` holds the special tokens too;
- `special_tokens.json`: `{token: id}`;
- `tokenizer.json`: for Hugging Face `tokenizers`;
- `ranks.tiktoken`: for `tiktoken.load.load_tiktoken_bpe` (special tokens are passed to `tiktoken.Encoding` apart).
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainkit.artifacts import MANIFEST, verify_directory
from trainkit.errors import UserError
from transformerlm.tokenizer.vocabulary import (
    BYTES,
    Merge,
    Vocabulary,
    check_special_tokens,
    check_vocabulary,
    token_from_name,
    token_name,
)

VOCAB = "vocab.json"
MERGES = "merges.txt"
SPECIAL_TOKENS = "special_tokens.json"
TOKENIZER_JSON = "tokenizer.json"
TIKTOKEN = "ranks.tiktoken"

MERGES_HEADER = "#version: 0.2"
LOOKS_SPECIAL = re.compile(r"<\|.+\|>|<.+>|\[.+\]")
"""Names that may be taken for special tokens where no file lists them."""


def read_vocabulary(path: Path | str) -> Vocabulary:
    """The vocabulary in a tokenizer directory (its manifest verified if there is one) or in a `tokenizer.json`."""
    path = Path(path)
    if path.is_file():
        return read_tokenizer_json(path)
    if not path.is_dir():
        raise UserError(f"there is no tokenizer at {path}; train one with transformerlm-train-tokenizer")
    if (path / MANIFEST).exists():
        verify_directory(path)
    if (path / VOCAB).exists() and (path / MERGES).exists():
        special_tokens = path / SPECIAL_TOKENS
        return read_gpt2_files(path / VOCAB, path / MERGES, special_tokens if special_tokens.exists() else None)
    if (path / TOKENIZER_JSON).exists():
        return read_tokenizer_json(path / TOKENIZER_JSON)
    raise UserError(f"{path} holds no tokenizer: neither {VOCAB} and {MERGES} nor {TOKENIZER_JSON}; name another path")


def read_gpt2_files(vocab: Path | str, merges: Path | str, special_tokens: Path | str | None = None) -> Vocabulary:
    """Read GPT-2's two files and a list of special tokens: names, `{name: id}`, or Hugging Face's `{role: name}`.

    Without a list, vocabulary entries that no merge makes and that look like `<|name|>`, `<name>` or `[name]` are
    special. Listed tokens that the vocabulary lacks are appended to it.
    """
    ids = _read_ids(Path(vocab))
    pairs = _read_merges(Path(merges))
    names = _read_special_names(Path(special_tokens)) if special_tokens is not None else {}
    return _assemble(ids, pairs, names, source=str(vocab))


def read_tokenizer_json(path: Path | str) -> Vocabulary:
    """Read Hugging Face's format, if it describes what this tokenizer does: byte-level BPE with GPT-2's pattern."""
    data = _read_json(Path(path))
    try:
        model = data["model"]
        _check_settings(data, model, str(path))
        ids = {str(name): _as_id(value) for name, value in model["vocab"].items()}
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        added = {str(token["content"]): _as_id(token["id"]) for token in data.get("added_tokens") or []}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer.json of a BPE model ({error!r}); use another file") from error
    return _assemble(ids, pairs, added, source=str(path))


def write_vocabulary(vocabulary: Vocabulary, directory: Path) -> None:
    """Write every form into `directory`, which exists; publishing it whole is the caller's part."""
    names = {token_name(token): token_id for token, token_id in vocabulary.tokens.items()} | dict(
        vocabulary.special_tokens
    )
    names = dict(sorted(names.items(), key=lambda item: item[1]))
    merges = [(token_name(left), token_name(right)) for left, right in vocabulary.merges]
    files = {
        VOCAB: json.dumps(names, ensure_ascii=False) + "\n",
        MERGES: "\n".join([MERGES_HEADER, *(f"{left} {right}" for left, right in merges)]) + "\n",
        SPECIAL_TOKENS: json.dumps(vocabulary.special_tokens, ensure_ascii=False, indent=1) + "\n",
        TOKENIZER_JSON: json.dumps(_tokenizer_json(names, merges, vocabulary), ensure_ascii=False) + "\n",
    }
    if _ids_follow_merges(vocabulary):
        files[TIKTOKEN] = "".join(
            f"{base64.b64encode(token).decode()} {token_id}\n" for token, token_id in vocabulary.tokens.items()
        )
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8", newline="\n")


def _assemble(
    ids: dict[str, int], pairs: Iterable[tuple[str, ...]], special: Mapping[str, int | None], source: str
) -> Vocabulary:
    """Tell ordinary tokens from special ones and check that all of it fits together."""
    check_special_tokens(special, source)
    merges = tuple(_merge_from_names(pair, number, source) for number, pair in enumerate(pairs, start=1))
    for name, token_id in special.items():
        if token_id is not None and ids.get(name, token_id) != token_id:
            raise UserError(f"{source}: the special token {name!r} has two ids, {ids[name]} and {token_id}")
    made = {*BYTES, *(left + right for left, right in merges)}
    tokens: dict[bytes, int] = {}
    special_tokens = {name: token_id for name, token_id in special.items() if token_id is not None}
    for name, token_id in ids.items():
        token = _token_from_name(name)
        # Where a list is given, it alone decides; and a name made by merges is never special by its looks.
        if name in special or (not special and token not in made and LOOKS_SPECIAL.fullmatch(name)):
            special_tokens[name] = token_id
        elif token is None:
            raise UserError(f"{source}: the token {name!r} holds characters that stand for no byte; list it as special")
        else:
            tokens[token] = token_id
    vocabulary = Vocabulary(tokens, merges, special_tokens)
    check_vocabulary(vocabulary, source)
    return vocabulary.with_special_tokens(special)


def _merge_from_names(pair: tuple[str, ...], number: int, source: str) -> Merge:
    tokens = [_token_from_name(name) for name in pair]
    if len(tokens) != 2 or not all(tokens):
        raise UserError(f"{source}: merge {number} ({' '.join(pair)}) is not a pair of byte-level tokens")
    left, right = tokens
    assert left and right
    return left, right


def _token_from_name(name: str) -> bytes | None:
    try:
        return token_from_name(name)
    except KeyError:
        return None


def _read_ids(path: Path) -> dict[str, int]:
    data = _read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a vocabulary: it must be an object of tokens and ids")
    try:
        return {name: _as_id(value) for name, value in data.items()}
    except ValueError as error:
        raise UserError(f"{path} is not a vocabulary: {error}") from error


def _read_merges(path: Path) -> list[tuple[str, ...]]:
    lines = [line.rstrip("\r") for line in _read_text(path).split("\n")]
    # Only a version line is a comment: "# #" is a merge.
    start = 1 if lines[0].startswith("#version") else 0
    return [tuple(line.split(" ")) for line in lines[start:] if line]


def _read_special_names(path: Path) -> dict[str, int | None]:
    """Each special token of the file, with its id where the file gives one."""
    data = _read_json(path)
    names: list[Any] | None = data if isinstance(data, list) else None
    if isinstance(data, dict):
        if all(type(value) is int for value in data.values()):
            return {str(name): value for name, value in data.items()}
        names = []
        for value in data.values():  # each role has a name, or a description that holds it
            name = value.get("content") if isinstance(value, dict) else value
            if name not in names:
                names.append(name)
    if names is not None and all(isinstance(name, str) for name in names):
        check_special_tokens(names, str(path))
        return dict.fromkeys(names)
    raise UserError(f"{path} is not a list of special tokens; write for example " + '["<|endoftext|>"]')


def _check_settings(data: Any, model: Any, source: str) -> None:
    """Refuse settings under which our ids would differ silently."""
    pre_tokenizer = data.get("pre_tokenizer") or {}
    unsupported: dict[str, Callable[[], bool]] = {
        "model.type": lambda: model.get("type", "BPE") != "BPE",
        "model.dropout": lambda: bool(model.get("dropout")),
        "model.continuing_subword_prefix": lambda: bool(model.get("continuing_subword_prefix")),
        "model.end_of_word_suffix": lambda: bool(model.get("end_of_word_suffix")),
        "model.byte_fallback": lambda: bool(model.get("byte_fallback")),
        "model.ignore_merges": lambda: bool(model.get("ignore_merges")),
        "normalizer": lambda: bool(data.get("normalizer")),
        "pre_tokenizer": lambda: (
            pre_tokenizer.get("type") != "ByteLevel"
            or pre_tokenizer.get("add_prefix_space", True)
            or not pre_tokenizer.get("use_regex", True)
        ),
        "added_tokens": lambda: any(
            token.get(setting)
            for token in data.get("added_tokens") or []
            for setting in ("single_word", "lstrip", "rstrip")
        ),
    }
    for setting, is_unsupported in unsupported.items():
        if is_unsupported():
            raise UserError(
                f"{source}: its setting `{setting}` is not supported; only byte-level BPE with GPT-2's pattern "
                "and no prefix space can be read"
            )


def _tokenizer_json(names: dict[str, int], merges: list[tuple[str, str]], vocabulary: Vocabulary) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, token_id in vocabulary.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": names,
            "merges": merges,
        },
    }


def _ids_follow_merges(vocabulary: Vocabulary) -> bool:
    """Whether ids can serve as tiktoken's ranks: a later merge has a larger id."""
    made = [vocabulary.tokens[left + right] for left, right in vocabulary.merges]
    return all(earlier < later for earlier, later in pairwise(made))


def _as_id(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not an id")
    return value


def _read_json(path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            repeated = next(name for name in result if names.count(name) > 1)
            raise UserError(f"{path}: the entry {repeated!r} appears twice; use an undamaged file")
        return result

    text = _read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); use an undamaged file") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8 ({error.reason}); use an undamaged file") from error
