"""What is asked of the hub, run in a process of its own: `huggingface_hub` reads its address when it is imported.

`python -m tests.trainkit.hub_cases FOLDER [CASE…]` prints {case: "" or its traceback} as JSON.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tests.trainkit.fake_hub import Dataset, FakeHub, Trouble, running
from trainkit.data.document_sets import ShardedDocuments
from trainkit.data.hub import KeptDocuments, open_hub_documents, resolve_revision
from trainkit.data.hub_files import HubFile, Network
from trainkit.errors import UserError
from trainkit.retries import Backoff

SHA, LATER_SHA = "a1" * 20, "b2" * 20
ROWS = [f"row {i}: {'äöü€𝄞'[i % 5]} " + "word " * (i % 40) for i in range(3000)]
TEXT_ROWS = ["first", "", "  indented", "crlf", "old mac", "\u2028 no break", "last without a line break"]
HALF, REST = ROWS[:1300], ROWS[1300:]


def parquet(rows: list[Any], column: str = "text") -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    other = [b"%d" % i * 300 for i in range(len(rows))]
    pq.write_table(
        pa.table({"other": other, column: rows}), buffer, row_group_size=450, compression="none", use_dictionary=False
    )
    return buffer.getvalue()


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": row}).encode() + b"\n" for i, row in enumerate(rows))


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def data_sets() -> dict[str, Dataset]:
    text = "first\n\n  indented\ncrlf\r\nold mac\r\u2028 no break\nlast without a line break".encode()
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n" for name in ("one", "two")
    )
    return {
        "org/parquet": Dataset(
            {
                "data/train-0.parquet": parquet(HALF),
                "data/train-1.parquet": parquet(REST),
                "data/validation-0.parquet": parquet(ROWS[:7]),
                "README.md": b"---\nlicense: mit\n---\n",
            },
            SHA,
        ),
        "org/jsonl": Dataset({"train-0.jsonl": jsonl(HALF), "train-1.jsonl": jsonl(REST)}, SHA),
        "org/gzip": Dataset({"train-0.jsonl.gz": zipped(jsonl(HALF)), "train-1.jsonl.gz": zipped(jsonl(REST))}, SHA),
        "org/lines": Dataset({"train.txt": text}, SHA),
        "org/lines-gz": Dataset({"train.txt.gz": zipped(text)}, SHA),
        "org/private": Dataset({"train.jsonl": jsonl(HALF)}, SHA, token="hf_secret"),
        "org/gated": Dataset({"train.jsonl": jsonl(HALF)}, SHA, gated=True),
        "org/two": Dataset(
            {"one/a.jsonl": jsonl(HALF), "two/a.jsonl": jsonl(REST), "README.md": card.encode() + b"---\n"}, SHA
        ),
        "org/csv": Dataset({"train.csv": b"text\nhello\n"}, SHA),
        "org/empty": Dataset({"README.md": b"nothing\n"}, SHA),
        "org/bad": Dataset(
            {
                "train-0.jsonl": jsonl([*ROWS[:5], None]),
                "train-1.jsonl": b'{"text": "fine"}\n{"text": \n',
                "train-2.jsonl": b'{"text": "\\ud800"}\n',
                "train-3.jsonl.gz": zipped(jsonl(HALF))[:-20],
                "train-4.jsonl": b'{"text": "\xff"}\n',
                "train-5.jsonl": b"7\n",
                "train-6.jsonl": b'{"text": "fine", "id": ' + b"1" * 5000 + b"}\n",
                "train-7.jsonl": b"[" * 100_000,
                "train-8.jsonl": b"",
            },
            SHA,
        ),
    }


@dataclass
class Clock:
    """Time that passes only in sleep; `at` names what happens when a moment has come."""

    now: float = 0.0
    waits: list[float] = field(default_factory=list)
    at: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds
        while self.at and self.at[0][0] <= self.now:
            self.at.pop(0)[1]()


class Client:
    """The arguments of a scenario, and what it was told."""

    def __init__(self, hub: FakeHub, folder: Path, stall: float = 5.0) -> None:
        self.hub = hub
        self.folder = folder
        self.clock = Clock()
        self.lines: list[str] = []
        backoff = Backoff(clock=lambda: self.clock.now, sleep=self.clock.sleep, jitter=lambda: 1.0)
        self.network = Network(report=self.lines.append, backoff=backoff, stall=stall)
        hub.troubles.clear()
        hub.requests.clear()
        hub.credentials.clear()

    def open(self, name: str, **options: Any) -> Any:
        return open_hub_documents(f"org/{name}", **{"split": "train", "network": self.network, **options})

    def refused(self, *words: str, act: Callable[[], object]) -> None:
        try:
            act()
        except UserError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 330, message
            for word in words:
                assert word in message, (word, message)
            assert not self.clock.waits, "what is permanent must not be tried again"
        else:
            raise AssertionError(f"not refused: {words}")


def everything(documents: ShardedDocuments) -> list[str]:
    return [text for shard in documents.shards for text in shard.read(0)]


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def case_every_format_gives_the_rows_of_the_library(c: Client) -> None:
    import datasets

    for name in ("parquet", "jsonl", "gzip", "lines", "lines-gz"):
        documents = c.open(name)
        rows = everything(documents)
        assert rows == (TEXT_ROWS if "lines" in name else ROWS), name
        if name in ("parquet", "lines"):
            theirs = datasets.load_dataset(f"org/{name}", split="train", streaming=True)
            assert [row["text"] for row in theirs] == rows, name
        assert SHA in documents.identity
    assert not c.lines and not c.clock.waits


def case_a_shard_opens_at_any_row(c: Client) -> None:
    for name in ("parquet", "jsonl", "gzip"):
        shard = c.open(name).shards[0]
        for start in (0, 1, 255, 256, 449, 450, 451, 900, 1299, 1300, 5000):
            assert list(shard.read(start)) == HALF[start:], (name, start)
    shard = c.open("lines").shards[0]
    for start in range(9):
        assert list(shard.read(start)) == TEXT_ROWS[start:]


def case_only_the_text_column_of_parquet_is_read(c: Client) -> None:
    shard = c.open("parquet").shards[0]
    c.hub.requests.clear()
    assert next(shard.read(1000)) == HALF[1000]
    asked = 0
    for request in c.hub.requests:
        first, last = re.findall(r"bytes=(\d+)-(\d+)", request)[0]
        asked += int(last) - int(first) + 1
    size = len(c.hub.datasets["org/parquet"].files["data/train-0.parquet"])
    assert size > 1_000_000 and asked < size / 3, (asked, size)


def case_troubles_lose_and_repeat_no_row(c: Client) -> None:
    kinds = [
        Trouble("", "status", status=429, headers={"Retry-After": "77"}),
        Trouble("", "status", status=503, times=3),
        Trouble("", "status", status=500),
        Trouble("", "reset", after=0),
        Trouble("", "reset", after=5000, times=3),
        Trouble("", "truncate", after=1, times=2),
        Trouble("", "truncate", after=20_000),
    ]
    for name in ("parquet", "jsonl", "gzip"):
        documents = c.open(name)
        for skip in (0, 2):
            for kind in kinds:
                trouble = Trouble("train-", kind.kind, kind.status, kind.after, kind.times, skip, kind.headers)
                c.hub.troubles[:] = [trouble]
                c.lines.clear()
                c.clock.waits.clear()
                assert everything(documents) == ROWS, (name, kind)
                used = kind.times - trouble.times
                assert used or skip, (name, kind)
                assert len(c.clock.waits) <= used and len(c.lines) >= len(c.clock.waits), (c.lines, kind)
                assert c.clock.waits or skip or kind.after > 5000, kind
                assert all("train-" in line and "\n" not in line for line in c.lines)
                if kind.status == 429 and used:
                    assert c.clock.waits == [77.0]


def case_a_stall_is_noticed(c: Client) -> None:
    c = Client(c.hub, c.folder, stall=1.0)
    documents = c.open("gzip")
    c.hub.troubles[:] = [Trouble("train-", "stall", after=3000), Trouble("train-1", "stall", after=0)]
    assert everything(documents) == ROWS
    assert len(c.clock.waits) >= 2, c.lines


def case_an_outage_of_five_minutes(c: Client) -> None:
    for name in ("parquet", "jsonl"):
        c = Client(c.hub, c.folder)
        documents = c.open(name)
        rows = [text for shard in documents.shards for text in read_with_outage(c, shard)]
        assert rows == ROWS, name
        assert c.clock.now >= 300 and max(c.clock.waits) <= 30
        assert c.clock.waits[:5] == [1, 2, 4, 8, 16], c.clock.waits
        assert c.lines[-1].endswith("again after 5 minutes"), c.lines


def read_with_outage(c: Client, shard: Any) -> Iterator[str]:
    reader = shard.read(0)
    for _ in range(100):
        yield next(reader)
    c.hub.down()
    c.clock.at = [(c.clock.now + 300.0, c.hub.up)]
    yield from shard.read(100)  # a run that was resumed meanwhile
    if not c.hub._server:  # what is left had been read before the outage
        c.hub.up()


def case_an_outage_without_end_is_one_sentence(c: Client) -> None:
    documents = c.open("jsonl")
    c.hub.troubles[:] = [Trouble("train-0", "status", status=502, times=10**6)]
    try:
        everything(documents)
    except UserError as error:
        assert "train-0.jsonl" in str(error) and "502" in str(error) and "minutes" in str(error)
    else:
        raise AssertionError
    assert 1700 < c.clock.now <= 1800


def case_a_start_without_a_network_gives_up_after_a_minute(c: Client) -> None:
    c.hub.down()
    try:
        c.open("jsonl")
    except UserError as error:
        assert "org/jsonl" in str(error) and "HF_DATASETS_OFFLINE" in str(error) and "cache" in str(error), error
    else:
        raise AssertionError
    finally:
        c.hub.up()
    assert 30 <= c.clock.now <= 60, c.clock.now
    # A hub that answers is there: it is waited for, as is one that is away for less.
    c = Client(c.hub, c.folder)
    c.hub.troubles[:] = [Trouble("/api/datasets/org/jsonl", "status", status=429, headers={"Retry-After": "300"})]
    assert resolve_revision("org/jsonl", network=c.network) == SHA and c.clock.now == 300
    c = Client(c.hub, c.folder)
    c.hub.down()
    c.clock.at = [(25.0, c.hub.up)]
    assert resolve_revision("org/jsonl", network=c.network) == SHA


def case_trouble_while_the_files_are_listed(c: Client) -> None:
    c.hub.troubles[:] = [
        Trouble("/api/datasets/org/jsonl", "status", status=503),
        Trouble("/tree/", "status", status=503),
    ]
    assert everything(c.open("jsonl")) == ROWS
    assert len(c.lines) == 1, c.lines  # the second is the library's, which waits a second by itself


def case_what_is_permanent_fails_at_once(c: Client) -> None:
    c.refused("org/nowhere", "404", "HF_TOKEN", act=lambda: c.open("nowhere"))
    c.refused("org/jsonl", "'v9'", "404", act=lambda: c.open("jsonl", revision="v9"))
    c.refused("org/jsonl", "404", act=lambda: c.open("jsonl", revision="c3" * 20))
    c.refused("org/private", "401", "HF_TOKEN", act=lambda: c.open("private"))
    c.refused("org/gated", "conditions", "HF_TOKEN", act=lambda: c.open("gated"))
    c.refused("'test'", "train, validation", "validation_fraction", act=lambda: c.open("parquet", split="test"))
    c.refused("'three'", "one", "two", act=lambda: c.open("two", config="three"))
    c.refused("one", "two", "dataset_config", act=lambda: c.open("two"))
    c.refused("train.csv", ".parquet", act=lambda: c.open("csv"))
    c.refused("org/empty", act=lambda: c.open("empty"))
    c.refused("no name", act=lambda: c.open("no name"))
    for name in ("parquet", "jsonl"):
        c.refused("'body'", "text", "train", act=lambda name=name: everything(c.open(name, text_field="body")))
    del c.hub.datasets["org/jsonl"].files["train-1.jsonl"]
    c.hub.troubles[:] = []
    gone = HubFile("org/jsonl", SHA, "train-1.jsonl")
    c.refused("train-1.jsonl", "404", act=gone.open(c.network, buffer_size=100).read)


def case_bad_rows_are_named(c: Client) -> None:
    shards = c.open("bad").shards
    for shard, words in zip(
        shards,
        (
            ["row 5", "train-0.jsonl", "nothing"],
            ["row 1", "JSON"],
            ["row 0", "surrogate"],
            ["gzip"],
            ["UTF-8"],
            ["row 0", "no column 'text'"],
            ["row 0", "JSON"],
            ["row 0", "JSON"],
        ),
        strict=False,
    ):
        c.refused(*words, act=lambda shard=shard: list(shard.read(0)))
    assert list(shards[-1].read(0)) == []
    c.hub.datasets["org/bad"] = Dataset({"train.parquet": parquet(ROWS)[:-3000] + bytes(3000)}, LATER_SHA)
    c.refused("train.parquet", "Parquet", act=lambda: everything(c.open("bad")))
    for damage in (damaged_page(), no_utf8()):
        c.hub.datasets["org/bad"] = Dataset({"train.parquet": damage}, f"{len(c.hub.requests):040x}")
        c.refused("train.parquet", "Parquet", act=lambda: everything(c.open("bad")))


def damaged_page() -> bytes:
    """A compressed page that cannot be decompressed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ROWS}), buffer, compression="snappy", use_dictionary=False)
    content = bytearray(buffer.getvalue())
    content[200:2000] = b"\xff" * 1800
    return bytes(content)


def no_utf8() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [*ROWS[:5], "MARK"]}), buffer, compression="none", use_dictionary=False)
    return buffer.getvalue().replace(b"MARK", b"\xff\xfe\xff\xfe")


def case_a_token_is_sent_and_never_shown(c: Client) -> None:
    with environment(HF_TOKEN="hf_secret"):
        assert everything(c.open("private")) == HALF
    stored = Path(os.environ["HF_HOME"], "token")
    stored.write_text("hf_secret")
    try:
        documents = c.open("private")
        assert everything(documents) == HALF
    finally:
        stored.unlink()
    with environment(HF_TOKEN="hf_wrong"):
        c.refused("org/private", act=lambda: c.open("private"))
    assert "hf_" not in str(c.lines) + documents.identity


def case_redirected_files_get_no_token(c: Client) -> None:
    with running() as elsewhere, environment(HF_TOKEN="hf_secret"):
        elsewhere.datasets = data_sets()
        elsewhere.datasets["org/private"].token = ""
        c.hub.datasets["org/private"].elsewhere = elsewhere.url
        documents = c.open("private")
        elsewhere.troubles[:] = [Trouble("train", "truncate", after=1000), Trouble("train", "status", status=503)]
        assert everything(documents) == HALF
        assert elsewhere.credentials == {""} and c.hub.credentials == {"Bearer hf_secret"}
        assert len(c.clock.waits) == 2
        # Signed addresses run out, so that every try needs a new one.
        ranges = [[request for request in hub.requests if "bytes" in request] for hub in (c.hub, elsewhere)]
        assert len(ranges[0]) == len(ranges[1]) > 2


def case_configurations(c: Client) -> None:
    assert everything(c.open("two", config="one")) == HALF
    assert everything(c.open("two", config="two")) == REST


def case_the_first_documents(c: Client) -> None:
    for name in ("parquet", "gzip"):
        for limit in (1, 1299, 1300, 1301, 2999, 3000, 9000):
            documents = c.open(name, max_documents=limit)
            assert everything(documents) == ROWS[:limit]
            (shard,) = documents.shards
            for start in (0, 5, 1299, 1300, 1400, 2999, 3000, 8000):
                assert list(shard.read(start)) == ROWS[start:limit], (name, limit, start)
            (fresh,) = c.open(name, max_documents=limit).shards
            assert list(fresh.read(1400)) == ROWS[1400:limit]
    assert c.open("gzip").identity != c.open("gzip", max_documents=5).identity


def case_a_revision_is_resolved_once(c: Client) -> None:
    try:
        first = c.open("jsonl")
        c.hub.datasets["org/jsonl"].sha = LATER_SHA
        later = c.open("jsonl")
        assert SHA in first.identity and LATER_SHA in later.identity
        asked = [request for request in c.hub.requests if "resolve" in request and "train-" in request]
        assert not asked
        assert resolve_revision("org/jsonl", SHA, network=c.network) == SHA
        assert resolve_revision("org/jsonl", "main", network=c.network) == LATER_SHA
    finally:
        c.hub.datasets["org/jsonl"].sha = SHA


def case_kept_on_the_disk_and_read_without_network(c: Client) -> None:
    cache = str(c.folder / "kept")
    for options in ({"streaming": False}, {"streaming": True}):
        for name in ("parquet", "gzip"):
            with environment(HF_DATASETS_CACHE=f"{cache}-{options['streaming']}"):
                c.hub.troubles[:] = [Trouble("train-1", "reset", after=2000, times=2)]
                online = c.open(name, **options)
                check_rows(online)
                c.hub.requests.clear()
                check_rows(c.open(name, revision=SHA, **options))
                assert not c.hub.requests, "a pinned data set that is kept needs no network"
                c.hub.down()
                with environment(HF_DATASETS_OFFLINE="1"):
                    offline = c.open(name, **options)
                    assert offline.identity == online.identity
                    check_rows(offline)
                    c.clock.waits.clear()
                    c.refused("run once", act=lambda name=name: c.open(name, split="validation"))
                    c.refused("run once", "HF_DATASETS_CACHE", act=lambda: c.open("jsonl"))
                with environment(HF_HUB_OFFLINE="1"):
                    assert c.open(name, **options).identity == online.identity
                c.hub.up()
    few = c.open("parquet", streaming=False, cache_dir=cache, max_documents=10)
    assert isinstance(few, KeptDocuments) and len(few) == 10 and few[9] == ROWS[9]
    assert not [request for request in c.hub.requests if "train-1.parquet" in request]
    for index in (-1, 10):
        try:
            few[index]
        except IndexError:
            continue
        raise AssertionError(index)


def check_rows(documents: Any) -> None:
    if isinstance(documents, KeptDocuments):
        assert len(documents) == len(ROWS)
        assert [documents[i] for i in range(len(ROWS))] == ROWS
        assert documents[2000] == ROWS[2000] and documents[1299] == ROWS[1299]
    else:
        assert everything(documents) == ROWS
        assert list(documents.shards[1].read(700)) == REST[700:]


def case_caches_take_precedence(c: Client) -> None:
    def places() -> set[str]:
        return {path.name for path in c.folder.glob("cache-*") if any(path.rglob("*.arrow"))}

    a, b, home = (str(c.folder / f"cache-{name}") for name in ("a", "b", "home"))
    with environment(HF_HOME=home):
        c.open("lines", streaming=False)
        assert places() == {"cache-home"}
        with environment(HF_DATASETS_CACHE=b):
            c.open("lines", streaming=False)
            assert places() == {"cache-home", "cache-b"}
            c.open("lines", streaming=False, cache_dir=a)
            assert places() == {"cache-home", "cache-b", "cache-a"}
    with environment(HF_HOME=str(c.folder / "cache-none")):
        everything(c.open("lines"))
        assert places() == {"cache-home", "cache-b", "cache-a"}, "a stream without a named cache keeps nothing"


def case_random_troubles_from_random_rows(c: Client) -> None:
    chance = random.Random(7)
    documents = {name: c.open(name) for name in ("parquet", "jsonl", "gzip")}
    for _ in range(60):
        c = Client(c.hub, c.folder)
        c.hub.troubles[:] = [
            Trouble(
                "train-",
                chance.choice(["status", "reset", "truncate"]),
                status=chance.choice([408, 429, 500, 502, 503, 504]),
                after=chance.randrange(60_000),
                times=chance.randint(1, 3),
                skip=chance.randrange(3),
            )
            for _ in range(chance.randint(1, 4))
        ]
        name, number, start = chance.choice(list(documents)), chance.randrange(2), chance.randrange(1300)
        rows = (HALF, REST)[number]
        found = list(islice(documents[name].shards[number].read(start), chance.choice([None, 1, 200])))
        assert found == rows[start:][: len(found)] and found, (name, start)


def case_a_wrong_address_is_refused_at_once(c: Client) -> None:
    import huggingface_hub.constants as constants

    before = constants.HUGGINGFACE_CO_URL_TEMPLATE, constants.ENDPOINT
    gone = HubFile("org/jsonl", SHA, "train-1.jsonl")
    try:
        constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("http://", "ftp://")
        constants.ENDPOINT = constants.ENDPOINT.replace("http://", "ftp://")
        c.refused("HF_ENDPOINT", act=gone.open(c.network, buffer_size=100).read)
    finally:
        constants.HUGGINGFACE_CO_URL_TEMPLATE, constants.ENDPOINT = before


def case_a_client_that_another_thread_has_closed(c: Client) -> None:
    from huggingface_hub.utils import close_session, get_session

    documents = c.open("jsonl")
    get_session().close()
    c.clock.at = [(0.5, close_session)]
    assert everything(documents) == ROWS and len(c.clock.waits) == 1


def case_ranks_that_want_one_file_fetch_it_once(c: Client) -> None:
    def fetched(threads: int) -> int:
        c.hub.requests.clear()
        cache = str(c.folder / str(threads))
        place = Path(cache)
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(c.open, "gzip", streaming=False, cache_dir=cache, revision=SHA) for _ in range(threads)]
            for job in jobs:
                check_rows(job.result())
        # What a killed process has left does not harm the next one.
        for file in place.rglob("*.arrow"):
            file.rename(file.with_name(f".{file.name}.tmp-"))
        check_rows(c.open("gzip", streaming=False, cache_dir=cache, revision=SHA))
        return sum("train-" in request for request in c.hub.requests)

    assert fetched(1) == fetched(4)


def case_a_damaged_or_read_only_cache_is_one_sentence(c: Client) -> None:
    cache = c.folder / "damaged"
    c.open("lines", streaming=False, cache_dir=str(cache))
    (file,) = cache.rglob("*.arrow")
    file.write_bytes(file.read_bytes()[:-40])
    c.refused(str(file), "damaged", act=lambda: c.open("lines", streaming=False, cache_dir=str(cache)))
    for name in ("parquet", "lines"):  # whatever bit it is that flips, there is text or a sentence
        place = c.folder / f"flipped-{name}"
        documents = c.open(name, streaming=False, cache_dir=str(place))
        file = sorted(place.rglob("*.arrow"))[0]
        content = file.read_bytes()
        chance = random.Random(name)
        refused = 0
        for _ in range(60):
            at = chance.randrange(len(content))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :])
            try:
                documents = c.open(name, streaming=False, cache_dir=str(place))
                assert [documents[i] for i in range(len(documents))] == everything(c.open(name, cache_dir=str(place)))
            except UserError as error:
                assert str(file) in str(error) and "damaged" in str(error)
                refused += 1
        assert refused, name
    c.refused("/proc", act=lambda: c.open("lines", streaming=False, cache_dir="/proc/nothing"))


def main() -> None:
    folder = Path(sys.argv[1])
    noise = io.StringIO()
    results: dict[str, Any] = {}
    with running() as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(folder / "home"), HF_HUB_DISABLE_TELEMETRY="1")
        for key in ("HF_TOKEN", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
            os.environ.pop(key, None)
        logging.basicConfig(stream=noise, level=logging.WARNING)
        for name, case in list(globals().items()):
            if not name.startswith("case_") or (sys.argv[2:] and name not in sys.argv[2:]):
                continue
            hub.datasets = data_sets()
            (folder / name).mkdir()
            began = time.monotonic()
            try:
                case(Client(hub, folder / name))
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
            print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
            if not hub._server:
                hub.up()
    results["noise"] = noise.getvalue()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
