"""The tokenizer against independent ones on much text: 100 MB of the machine, 10^5 strings of any Unicode, long runs.

All of it takes a few minutes: `pytest tests/tokenizer/test_at_scale.py -m slow`.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain, combinations, product
from pathlib import Path

import pytest
import regex
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tokenizer.conftest import STORY
from tests.tokenizer.oracles import any_text, naive_encode, naive_merges, tiktoken_of
from tests.tokenizer.test_patterns import REFERENCE, bare, same_in_regex, split
from trainkit.errors import UserError
from transformerlm.tokenizer import compiled_trainer, readiness
from transformerlm.tokenizer import tokenizer as tokenizer_module
from transformerlm.tokenizer.compiled_trainer import WordCounter
from transformerlm.tokenizer.special_tokens import SpecialTokens
from transformerlm.tokenizer.specs import PatternName
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.trainer import count_words
from transformerlm.tokenizer.vocabulary import trained_vocabulary

pytestmark = pytest.mark.slow

TEXT_SIZE = 100_000_000
CHUNK = 5_000_000
RUN = 100_000
STRINGS_AT_A_TIME = 50
"""Together in one example: most of the time goes into what surrounds a string, not into the string."""


def many(examples: int) -> settings:
    unhealthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(deadline=None, max_examples=examples, suppress_health_check=unhealthy)


strings = st.lists(any_text, min_size=STRINGS_AT_A_TIME, max_size=STRINGS_AT_A_TIME)


@pytest.fixture(scope="module", autouse=True)
def always_compiled() -> Iterator[None]:
    readiness.load("compiled_encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "SHORT_TEXT", -1)
        yield


@pytest.fixture(scope="module")
def reference(gpt2: Tokenizer) -> tiktoken.Encoding:
    return tiktoken_of(gpt2)


def machine_texts(most: int) -> Iterator[str]:
    """Sources, documentation and translations that are installed here, each text once, some of every place."""
    roots = [Path("/usr/share"), Path("/usr/include"), Path(sysconfig.get_path("stdlib")), Path(find_numpy()).parent]
    suffixes = {
        ".py",
        ".pyi",
        ".md",
        ".rst",
        ".txt",
        ".html",
        ".h",
        ".hpp",
        ".c",
        ".js",
        ".css",
        ".json",
        ".xml",
        ".po",
    }
    seen: set[str] = set()
    for root in roots:
        taken = 0
        for path in sorted(path for path in root.rglob("*") if path.suffix in suffixes):
            if taken > most // len(roots):
                break
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text not in seen:
                seen.add(text)
                taken += len(text)
                yield text


def find_numpy() -> str:
    spec = find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent)


def in_chunks(texts: Iterable[str], size: int) -> Iterator[str]:
    parts: list[str] = []
    for text in texts:
        parts.append(text)
        if sum(map(len, parts)) >= size:
            yield "".join(parts)
            parts = []
    yield "".join(parts)


def test_real_text_of_the_machine(gpt2: Tokenizer, reference: tiktoken.Encoding) -> None:
    total = 0
    for chunk in in_chunks(machine_texts(TEXT_SIZE), CHUNK):
        expected = reference.encode_ordinary(chunk)
        for threads in (1, 2, 4):
            assert gpt2.encode(chunk, allowed_special="none", threads=threads).tolist() == expected
        total += len(chunk.encode())
        if total >= TEXT_SIZE:
            break
    print(f"{total / 1e6:.0f} MB compared")
    if total < TEXT_SIZE // 10:
        pytest.skip(f"only {total / 1e6:.0f} MB of text are installed here; their ids were equal")


@many(2000)
@given(texts=strings, threads=st.sampled_from([1, 2, 4]))
def test_any_unicode_equals_tiktoken(
    gpt2: Tokenizer, reference: tiktoken.Encoding, texts: list[str], threads: int
) -> None:
    expected = [reference.encode_ordinary(text) for text in texts]
    found = gpt2.encode_batch(texts, allowed_special="none", threads=threads)
    assert [ids.tolist() for ids in found] == expected


@cache
def bare_reference(pattern: PatternName) -> tiktoken.Encoding:
    ranks = dict(bare(pattern).vocabulary.tokens)
    return tiktoken.Encoding(name="bare", pat_str=REFERENCE[pattern], mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("pattern", ["cl100k", "o200k"])
@many(1000)
@given(texts=strings)
def test_any_unicode_in_the_other_patterns(pattern: PatternName, texts: list[str]) -> None:
    found = [ids.tolist() for ids in bare(pattern).encode_batch(texts)]
    assert found == [bare_reference(pattern).encode_ordinary(text) for text in texts]
    for text in texts:  # `regex` knows other versions of Unicode: characters that it sees differently are left out
        known = "".join(filter(same_in_regex, text))
        assert split(known, pattern) == regex.findall(REFERENCE[pattern], known)


@cache
def characters_by_category() -> dict[str, list[str]]:
    categories: dict[str, list[str]] = {}
    for code in range(0x110000):
        categories.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    return categories


CATEGORIES = re.findall("..", "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn")


@pytest.mark.parametrize("category", CATEGORIES)
def test_long_runs_of_each_class(gpt2: Tokenizer, reference: tiktoken.Encoding, category: str) -> None:
    characters = characters_by_category()[category]
    rng = random.Random(category)
    runs = [rng.choice(characters) * RUN, "".join(rng.choices(characters, k=RUN))]
    for text in (*runs, "x " + runs[1] + " x"):
        if category == "Cs":  # not text to tiktoken
            expected = list(gpt2._plain.encode(text, gpt2._special("none", "none")))
        else:
            expected = reference.encode_ordinary(text)
        for threads in (1, 2, 4):
            assert gpt2.encode(text, allowed_special="none", threads=threads).tolist() == expected


def found_specials(text: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The definition, place by place: plain text and the special token after it ("" at the end)."""
    plain, place = "", 0
    while place < len(text):
        here = [name for name in names if text.startswith(name, place)]
        if here:
            longest = max(here, key=len)
            yield plain, longest
            plain, place = "", place + len(longest)
        else:
            plain, place = plain + text[place], place + 1
    yield plain, ""


def test_every_arrangement_of_special_tokens() -> None:
    """Every set of up to three names of two or three letters, in every text of up to seven, all of one alphabet."""
    names = ["".join(letters) for length in (2, 3) for letters in product("ab", repeat=length)]
    texts = ["".join(letters) for length in range(8) for letters in product("ab", repeat=length)]
    merges = [(b"a", b"b"), (b"b", b"b")]
    ids_of = {
        text: [trained_vocabulary(merges, []).tokens[part] for part in naive_encode(text.encode(), merges)]
        for text in texts
    }
    for chosen in chain.from_iterable(combinations(names, size) for size in range(4)):
        if any(name.encode() in trained_vocabulary(merges, []).tokens for name in chosen):
            continue  # refused: a special token that is an ordinary one
        tokenizer = Tokenizer(trained_vocabulary(merges, chosen))
        ids = tokenizer.special_tokens
        for allowed in (chosen, chosen[:1]):
            matches = {text: list(found_specials(text, allowed)) for text in texts}
            expected = [
                [number for plain, name in matches[text] for number in (*ids_of[plain], *([ids[name]] if name else []))]
                for text in texts
            ]
            assert [row.tolist() for row in tokenizer.encode_batch(texts, allowed_special=allowed)] == expected
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tokenizer_module, "SHORT_TEXT", 200)
                assert [tokenizer.encode(text, allowed_special=allowed).tolist() for text in texts] == expected
        for forbidden in chosen[:1]:
            for text in texts[:: 1 + len(texts) // 20]:
                is_there = any(name == forbidden for _, name in found_specials(text, chosen))
                if is_there:
                    with pytest.raises(UserError, match=re.escape(repr(forbidden))):
                        tokenizer.encode(text, allowed_special=chosen[1:], disallowed_special=[forbidden])
                else:
                    tokenizer.encode(text, allowed_special=chosen[1:], disallowed_special=[forbidden])


@cache
def corpora() -> dict[str, str]:
    texts = "".join(machine_texts(2_000_000))
    size = 60_000
    return {
        "first": texts[:size],
        "middle": texts[len(texts) // 2 :][:size],
        "last": texts[-size:],
        "story": STORY[::-1] * 20,
        "not ascii": "".join(regex.findall(r"[^\x00-\x7f]+ ?", texts))[:size],
    }


@pytest.mark.parametrize("name", ["first", "middle", "last", "story", "not ascii"])
def test_merges_equal_the_naive_trainer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_trainer, "PART", 2000)
    readiness.load("compiled_trainer")
    text = corpora()[name]
    expected = naive_merges(count_words([text]), 300)
    for threads in (1, 2, 4):
        counter = WordCounter(SpecialTokens({}, frozenset()), threads)
        counter.count([text])
        assert compiled_trainer.learn_merges(*counter.table.nodes(), 300, lambda stage, done: None) == expected


@pytest.mark.parametrize("imports", ["import torch, numba", "import numba, torch"])
def test_beside_torch_in_one_process(imports: str) -> None:
    if find_spec("torch") is None:
        pytest.skip("needs torch")
    code = f"""
{imports}
import threading
from transformerlm.tokenizer import readiness
from transformerlm.tokenizer.tokenizer import Tokenizer
from transformerlm.tokenizer.specs import TokenizerTrainingSpec
from transformerlm.tokenizer.trainer import train_tokenizer
readiness.LOADING_COST = readiness.COMPILATION_COST = 0
torch.set_num_threads(2)
text = {STORY!r} * 1000
tokenizer = train_tokenizer([text], TokenizerTrainingSpec(vocab_size=330), threads=2)
expected = list(tokenizer._plain.encode(text[:100_000], tokenizer._special("all", "none")))
weights = torch.randn(300, 300)
product = weights @ weights
def work():
    for _ in range(2):
        assert tokenizer.encode(text[:100_000]).tolist() == expected
        assert tokenizer.decode(tokenizer.encode(text, threads=2)) == text
workers = [threading.Thread(target=work) for _ in range(2)]
[worker.start() for worker in workers]
for _ in range(200):
    assert torch.allclose(weights @ weights, product)
[worker.join() for worker in workers]
assert torch.from_numpy(tokenizer.encode(text)).dtype == torch.uint16
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "done\n", done.stderr
    assert "Error" not in done.stderr
