"""Read and write vocabularies: GPT-2's files, Hugging Face's `tokenizer.json`, and tiktoken's ranks.

A tokenizer directory holds the same vocabulary in each form, so that other tools load it with identical ids:

- `vocab.json`, `merges.txt`: GPT-2's; `vocab.json` holds the special tokens too;
- `special_tokens.json`: `{token: id}`;
- `tokenizer.json`: for Hugging Face `tokenizers`;
- `ranks.tiktoken`: for `tiktoken.load.load_tiktoken_bpe` (special tokens are passed to `tiktoken.Encoding` apart);
- `pattern.txt`: the name of the pattern, where it is not GPT-2's.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainkit.artifacts import MANIFEST, verify_directory
from trainkit.errors import UserError
from transformerlm.tokenizer.pretokenizer import PATTERNS
from transformerlm.tokenizer.readiness import no_garbage
from transformerlm.tokenizer.specs import PatternName
from transformerlm.tokenizer.vocabulary import (
    BYTES,
    LARGEST_ID,
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
PATTERN = "pattern.txt"

MERGES_HEADER = "#version: 0.2"
LOOKS_SPECIAL = re.compile(r"<\|.+\|>|<.+>|\[.+\]")
"""Names that may be taken for special tokens where no file lists them."""


@no_garbage()
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
        pattern = _read_pattern(path / PATTERN) if (path / PATTERN).exists() else "gpt2"
        special = special_tokens if special_tokens.exists() else None
        return replace(read_gpt2_files(path / VOCAB, path / MERGES, special), pattern=pattern)
    if (path / TOKENIZER_JSON).exists():
        return read_tokenizer_json(path / TOKENIZER_JSON)
    raise UserError(f"{path} holds no tokenizer: neither {VOCAB} and {MERGES} nor {TOKENIZER_JSON}; name another path")


@no_garbage()
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
    """Read Hugging Face's format, if it describes what this tokenizer does: byte-level BPE with a pattern of ours."""
    data = _read_json(Path(path))
    try:
        model = data["model"]
        pattern = _check_settings(data, model, str(path))
        ids = {str(name): _as_id(value) for name, value in model["vocab"].items()}
        pairs = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model["merges"]]
        added = {str(token["content"]): _as_id(token["id"]) for token in data.get("added_tokens") or []}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer.json of a BPE model ({error!r}); use another file") from error
    return replace(_assemble(ids, pairs, added, source=str(path)), pattern=pattern)


def read_tiktoken(path: Path | str, pattern: PatternName, special_tokens: Mapping[str, int]) -> Vocabulary:
    """Read tiktoken's ranks, a line of base64 and number per token. The file tells neither pattern nor special tokens.

    tiktoken merges any two neighbours that together are a token, the lowest rank first. That equals merging one pair
    for each token: the one into which the lower ranks merge its bytes.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_read_text(Path(path)).splitlines(), start=1):
        try:
            name, rank = line.split()
            token = base64.b64decode(name, validate=True)
            value = int(rank)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not base64 and a rank ({error}); use an undamaged file") from error
        if not token or token in ranks:
            raise UserError(f"{path}, line {number}: the token is empty or appears twice; use an undamaged file")
        ranks[token] = value
    merges = tuple(
        _last_merge(token, ranks, str(path)) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    )
    vocabulary = Vocabulary(ranks, merges, dict(special_tokens), pattern)
    check_vocabulary(vocabulary, str(path))
    return vocabulary


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
    if vocabulary.pattern != "gpt2":
        files[PATTERN] = vocabulary.pattern + "\n"
    for name, content in files.items():
        (directory / name).write_text(content, encoding="utf-8", newline="\n")


def _last_merge(token: bytes, ranks: Mapping[bytes, int], source: str) -> Merge:
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, LARGEST_ID + 1) for left, right in pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        if joined[best] >= ranks[token]:
            raise UserError(
                f"{source}: tokens of lower rank never merge into {token_name(token)!r}; this is no byte-level BPE"
            )
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _read_pattern(path: Path) -> PatternName:
    name = _read_text(path).strip()
    for known in PATTERNS:
        if name == known:
            return known
    raise UserError(f"{path} names the pattern {name!r}; known are {', '.join(PATTERNS)}")


def _assemble(
    ids: dict[str, int], pairs: Iterable[Sequence[str]], special: Mapping[str, int | None], source: str
) -> Vocabulary:
    """Tell ordinary tokens from special ones and check that all of it fits together."""
    check_special_tokens(special, source)
    token_of = {name: _token_from_name(name) for name in ids}
    merges = _merges_from_names(pairs, token_of, source)
    for name, token_id in special.items():
        if token_id is not None and ids.get(name, token_id) != token_id:
            raise UserError(f"{source}: the special token {name!r} has two ids, {ids[name]} and {token_id}")
    made = {*BYTES, *(left + right for left, right in merges)}
    tokens: dict[bytes, int] = {}
    special_tokens = {name: token_id for name, token_id in special.items() if token_id is not None}
    for name, token_id in ids.items():
        token = token_of[name]
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


def _merges_from_names(
    pairs: Iterable[Sequence[str]], token_of: Mapping[str, bytes | None], source: str
) -> tuple[Merge, ...]:
    merges: list[Merge] = []
    for number, pair in enumerate(pairs, start=1):
        left, right = pair if len(pair) == 2 else ("", "")
        # Nearly all of them are in the vocabulary, and need not be translated again.
        left_token = token_of[left] if left in token_of else _token_from_name(left)
        right_token = token_of[right] if right in token_of else _token_from_name(right)
        if not left_token or not right_token:
            raise UserError(f"{source}: merge {number} ({' '.join(pair)}) is not a pair of byte-level tokens")
        merges.append((left_token, right_token))
    return tuple(merges)


def _token_from_name(name: str) -> bytes | None:
    try:
        return token_from_name(name)
    except KeyError:
        return None


def _read_ids(path: Path) -> dict[str, int]:
    data = _read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a vocabulary: it must be an object of tokens and ids")
    if wrong := [value for value in data.values() if type(value) is not int]:
        raise UserError(f"{path} is not a vocabulary: {wrong[0]!r} is not an id")
    return data


def _read_merges(path: Path) -> list[list[str]]:
    lines = _read_text(path).replace("\r\n", "\n").split("\n")
    # Only a version line is a comment: "# #" is a merge.
    start = 1 if lines[0].startswith("#version") else 0
    return [line.split(" ") for line in lines[start:] if line]


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


def _check_settings(data: Any, model: Any, source: str) -> PatternName:
    """The pattern; settings under which our ids would differ silently are refused."""
    pre_tokenizer = data.get("pre_tokenizer") or {}
    pattern = _pattern_of(pre_tokenizer)
    unsupported: dict[str, Callable[[], bool]] = {
        "model.type": lambda: model.get("type", "BPE") != "BPE",
        "model.dropout": lambda: bool(model.get("dropout")),
        "model.continuing_subword_prefix": lambda: bool(model.get("continuing_subword_prefix")),
        "model.end_of_word_suffix": lambda: bool(model.get("end_of_word_suffix")),
        "model.byte_fallback": lambda: bool(model.get("byte_fallback")),
        "model.ignore_merges": lambda: bool(model.get("ignore_merges")),
        "normalizer": lambda: bool(data.get("normalizer")),
        "pre_tokenizer": lambda: pattern is None,
        "added_tokens": lambda: any(
            token.get(setting)
            for token in data.get("added_tokens") or []
            for setting in ("single_word", "lstrip", "rstrip")
        ),
    }
    for setting, is_unsupported in unsupported.items():
        if is_unsupported():
            raise UserError(
                f"{source}: its setting `{setting}` is not supported; only byte-level BPE with the pattern "
                "of GPT-2, cl100k or o200k and no prefix space can be read"
            )
    assert pattern is not None
    return pattern


def _pattern_of(pre_tokenizer: Any) -> PatternName | None:
    """The pattern that a `pre_tokenizer` stands for, if it is one of ours."""
    steps = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space", True):
        return None
    if len(steps) == 1:
        return "gpt2" if byte_level.get("use_regex", True) else None
    split = steps[0]
    if len(steps) > 2 or split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    if byte_level.get("use_regex", True):
        return None
    return next((name for name, pattern in PATTERNS.items() if split["pattern"] == {"Regex": pattern}), None)


def _tokenizer_json(names: dict[str, int], merges: list[tuple[str, str]], vocabulary: Vocabulary) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[vocabulary.pattern]}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, {**byte_level, "use_regex": False}]
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
        "pre_tokenizer": byte_level if vocabulary.pattern == "gpt2" else {"type": "Sequence", "pretokenizers": steps},
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
