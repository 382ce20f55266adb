"""A file of a hub data set as a seekable stream that outlives trouble with the network.

It is read in ranges. A range that breaks off goes on at the byte where it did, so that whoever reads (a decompressor, a
Parquet reader) notices nothing but the time, and no row is lost or comes twice.

`huggingface_hub` supplies addresses, credentials and the HTTP client; its own file objects are not used, because they
retry in silence, in a rhythm of their own and with log lines, and give up within seconds.
"""

from __future__ import annotations

import email.utils
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainkit.errors import UserError
from trainkit.retries import Backoff, TransientError, Trouble

if TYPE_CHECKING:
    from typing_extensions import Buffer

# What says in any HTTP library that trying again is of no use; their other errors are troubles of the network.
_PERMANENT_ERRORS = {
    *("UnsupportedProtocol", "InvalidURL", "TooManyRedirects", "LocalProtocolError", "SSLCertVerificationError"),
    *("MissingSchema", "InvalidSchema"),  # of `requests`
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """How to talk to the hub."""

    report: Callable[[str], None] = field(default=lambda line: None)
    """Takes one line about a trouble or its end."""
    backoff: Backoff = field(default_factory=Backoff)
    stall: float = 30.0
    """Seconds without a byte after which a connection counts as broken."""

    def trouble(self, what: str) -> Trouble:
        return Trouble(what, self.backoff, self.report)

    def first_contact(self, what: str) -> Trouble:
        """Trouble with what a run asks before anything else."""
        advice = (
            "check the network, or, where a run with the network has filled the cache (data.cache_dir or "
            "HF_DATASETS_CACHE), set HF_DATASETS_OFFLINE=1"
        )
        return Trouble(what, self.backoff, self.report, advice, was_heard=False)


@dataclass(frozen=True)
class HubFile:
    """Address of one file at one commit."""

    dataset: str
    revision: str
    """Commit hash, so that the content never changes."""
    path: str

    @property
    def name(self) -> str:
        return f"{self.path} of the data set {self.dataset!r}"

    def open(self, network: Network, *, buffer_size: int) -> io.BufferedReader:
        """The bytes; `buffer_size` is the smallest range to ask for."""
        return io.BufferedReader(_Ranges(self, network), buffer_size)


class _Ranges(io.RawIOBase):
    def __init__(self, file: HubFile, network: Network) -> None:
        self._file = file
        self._network = network
        self._position = 0
        self._known_size: int | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._size()
        self._position = offset
        return offset

    def readinto(self, buffer: Buffer, /) -> int:
        """Fills `buffer`, but for the end of the file."""
        view = memoryview(buffer).cast("B")
        if not len(view) or (self._known_size is not None and self._position >= self._known_size):
            return 0
        count = self._fill(view)
        self._position += count
        return count

    def _size(self) -> int:
        if self._known_size is None:
            self._fill(memoryview(bytearray(1)))
        assert self._known_size is not None
        return self._known_size

    def _fill(self, view: memoryview) -> int:
        """Fill `view` with what lies at the position, up to the end of the file; the number of bytes."""
        trouble = self._network.trouble(self._file.name)
        filled = 0
        while True:
            before = filled
            try:
                for chunk in self._range(self._position + filled, len(view) - filled):
                    view[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
                size = self._known_size
                if size is None or filled < min(len(view), max(size - self._position, 0)):
                    raise TransientError("the connection broke off")
                trouble.over()
                return filled
            except TransientError as error:
                if filled > before:
                    trouble.over()
                trouble.wait(error)

    def _range(self, start: int, count: int) -> Iterator[bytes]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        file = self._file
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={start}-{start + count - 1}",
            "Accept-Encoding": "identity",  # ranges of compressed bytes would be other ranges
        }
        url = hf_hub_url(file.dataset, file.path, repo_type="dataset", revision=file.revision)
        try:
            with get_session().stream("GET", url, headers=headers, timeout=self._network.stall) as response:
                if response.status_code in (206, 416):  # 416: beyond the end, or the file is empty
                    self._known_size = int(response.headers["Content-Range"].rpartition("/")[2])
                if response.status_code == 206 and response.headers["Content-Range"].startswith(f"bytes {start}-"):
                    yield from response.iter_bytes()
                elif response.status_code != 416:
                    response.read()
                    hf_raise_for_status(response)
                    raise UserError(
                        f"cannot read {file.name}: the server does not serve ranges; use a mirror that does"
                    )
        except (TransientError, UserError, GeneratorExit):
            raise
        except RuntimeError as error:  # the library closes the client that all threads share when one cannot connect
            raise TransientError(_short(error)) from error
        except Exception as error:
            raise explain(error, file.name) from error


def explain(error: BaseException, what: str) -> UserError | TransientError:
    """What an error of `huggingface_hub` or its HTTP client means for reading `what`."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    # `datasets` wraps what happened in errors of its own, some of them twice.
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, (UserError, TransientError)):
            return cause
        if isinstance(cause, OfflineModeIsEnabled):
            return UserError(f"cannot read {what} while HF_DATASETS_OFFLINE or HF_HUB_OFFLINE is set; unset it")
        if isinstance(cause, GatedRepoError):
            return UserError(
                f"{what} is gated: accept its conditions on the hub's page of the data set, and set HF_TOKEN "
                "(or run `hf auth login`)"
            )
        if isinstance(cause, HfHubHTTPError):
            return _explain_status(cause.response, what)
    if any(type(cause).__name__ in _PERMANENT_ERRORS for cause in causes):
        return UserError(f"cannot read {what}: {_short(error)}; check HF_ENDPOINT and the proxy")
    if any(_is_network_error(cause) for cause in causes):
        return TransientError(_short(causes[-1]))
    return UserError(f"cannot read {what}: {_short(error)}")


def _explain_status(response: Any, what: str) -> UserError | TransientError:
    status = int(response.status_code)
    if status >= 500 or status in (408, 425, 429):
        return TransientError(f"the hub answers {status}", retry_after=_retry_after(response.headers), is_answer=True)
    if status in (401, 403, 404):
        return UserError(
            f"the hub has no {what}, or does not show it to you ({status}); check the name and the revision, "
            "and HF_TOKEN (or `hf auth login`) where it is private"
        )
    return UserError(f"cannot read {what}: the hub answers {status}; check the name and HF_ENDPOINT")


def _retry_after(headers: Any) -> float:
    """Seconds; the header holds them, or a date."""
    value = str(headers.get("Retry-After", "0"))
    if value.isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network_error(error: BaseException) -> bool:
    # By name: `huggingface_hub` has changed its HTTP client three times, and each has a family of its own.
    families = {"TransportError", "RequestException", "ClientError", "ConnectionError", "TimeoutError"}
    return any(kind.__name__ in families for kind in type(error).__mro__)


def _short(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
