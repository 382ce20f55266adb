"""What a tokenizer consists of, and what must hold for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from trainkit.errors import UserError
from transformerlm.tokenizer.specs import PatternName

BYTES = tuple(bytes([value]) for value in range(256))

LARGEST_ID = (1 << 24) - 1
"""A larger id is a damaged file rather than a vocabulary; tables indexed by id stay small."""

Merge = tuple[bytes, bytes]


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary. Check one that comes from outside with `check_vocabulary`."""

    tokens: Mapping[bytes, int]
    """Id of each ordinary token: all 256 single bytes, and what each merge makes."""
    merges: tuple[Merge, ...]
    """Pairs in the order in which they merge."""
    special_tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    """Id of each token that stands outside the text and is matched whole."""
    pattern: PatternName = "gpt2"
    """How text is cut into pre-tokens."""

    @property
    def size(self) -> int:
        """The largest id + 1: as many rows as an embedding needs. Foreign files may leave gaps below."""
        return max(max(self.tokens.values()), max(self.special_tokens.values(), default=0)) + 1

    def with_special_tokens(self, names: Iterable[str]) -> Vocabulary:
        """The same vocabulary with the missing ones of `names` appended, in their order."""
        special_tokens = dict(self.special_tokens)
        next_id = self.size
        for name in names:
            if name not in special_tokens:
                special_tokens[name] = next_id
                next_id += 1
        return replace(self, special_tokens=special_tokens)

    def content_hash(self) -> str:
        """SHA-256 of everything that decides which ids a text gets, and what ids mean."""
        digest = hashlib.sha256(f"byte-level BPE, {self.pattern} pattern\n".encode())
        for token, token_id in sorted(self.tokens.items()):
            digest.update(f"{token_id} {token.hex()}\n".encode())
        for left, right in self.merges:
            digest.update(f"{left.hex()}+{right.hex()}\n".encode())
        for name, token_id in sorted(self.special_tokens.items()):
            digest.update(f"{token_id} special {name.encode().hex()}\n".encode())
        return digest.hexdigest()


def trained_vocabulary(
    merges: Iterable[Merge], special_tokens: Iterable[str], pattern: PatternName = "gpt2"
) -> Vocabulary:
    """The ids that we give: the 256 bytes by value, the merges in order, the special tokens last."""
    merges = tuple(merges)
    tokens = {token: index for index, token in enumerate([*BYTES, *(left + right for left, right in merges)])}
    return Vocabulary(tokens, merges, pattern=pattern).with_special_tokens(special_tokens)


def check_vocabulary(vocabulary: Vocabulary, source: str) -> None:
    """Raise `UserError`, naming `source`, unless the parts fit together."""
    check_special_tokens(vocabulary.special_tokens, source)
    _check_ids(vocabulary, source)
    _check_merges(vocabulary, source)
    for name in vocabulary.special_tokens:
        if name.encode() in vocabulary.tokens:
            raise UserError(f"{source}: the special token {name!r} is an ordinary token too; rename one of them")


def check_special_tokens(names: Iterable[str], source: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise UserError(f"{source}: a special token is empty; give each a text, such as <|endoftext|>")
        if name in seen:
            raise UserError(f"{source}: the special token {name!r} is listed twice; remove one of the two")
        if not _is_unicode(name):
            raise UserError(f"{source}: the special token {name!r} is not valid Unicode; use plain characters")
        if len(name.encode()) == 1:
            raise UserError(
                f"{source}: the special token {name!r} is a single byte, which is an ordinary token already"
            )
        seen.add(name)


def _check_ids(vocabulary: Vocabulary, source: str) -> None:
    missing = [token for token in BYTES if token not in vocabulary.tokens]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of the 256 single bytes have no id, the first is 0x{missing[0].hex()}; "
            "this is not a byte-level vocabulary"
        )
    ids = [*vocabulary.tokens.values(), *vocabulary.special_tokens.values()]
    if len(set(ids)) == len(ids) and min(ids) >= 0 and max(ids) <= LARGEST_ID:
        return
    owners: dict[int, str] = {}
    everything = [(token_name(token), token_id) for token, token_id in vocabulary.tokens.items()]
    for name, token_id in [*everything, *vocabulary.special_tokens.items()]:
        if not 0 <= token_id <= LARGEST_ID:
            raise UserError(f"{source}: the token {name!r} has the id {token_id}, outside 0 to {LARGEST_ID}")
        if token_id in owners:
            raise UserError(f"{source}: the tokens {owners[token_id]!r} and {name!r} have the same id {token_id}")
        owners[token_id] = name


def _check_merges(vocabulary: Vocabulary, source: str) -> None:
    made: set[bytes] = set(BYTES)
    for number, (left, right) in enumerate(vocabulary.merges, start=1):
        for part in (left, right, left + right):
            if part not in vocabulary.tokens:
                raise UserError(
                    f"{source}: merge {number} ({token_name(left)} {token_name(right)}) does not fit the vocabulary, "
                    f"which has no token {token_name(part)!r}; use the two files of one tokenizer"
                )
        made.add(left + right)
    if len(set(vocabulary.merges)) != len(vocabulary.merges):
        raise UserError(f"{source}: a merge is listed twice; use the merges as they were trained")
    unmade = [token for token in vocabulary.tokens if token not in made]
    if unmade:
        raise UserError(
            f"{source}: no merge makes {len(unmade)} of the tokens, the first is {token_name(unmade[0])!r}; "
            "use the two files of one tokenizer, and list special tokens in special_tokens.json"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# GPT-2's files write a token's bytes as visible characters: a byte that prints in Latin-1 as itself, the others (space,
# control bytes, soft hyphen) in order as the characters from U+0100. A space becomes Ġ, a line end Ċ.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [value for value in range(256) if value not in _VISIBLE]
_CHARACTER = {value: chr(value) for value in _VISIBLE} | {value: chr(256 + n) for n, value in enumerate(_OTHERS)}
_BYTE = {character: value for value, character in _CHARACTER.items()}


def token_name(token: bytes) -> str:
    """`token` as GPT-2's files write it."""
    return "".join(map(_CHARACTER.__getitem__, token))


def token_from_name(name: str) -> bytes:
    """The bytes of a token written as in GPT-2's files; raises `KeyError` on a character that stands for no byte."""
    return bytes(map(_BYTE.__getitem__, name))
