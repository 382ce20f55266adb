"""Waiting out trouble that passes: exponential backoff with jitter, and one sentence when it does not pass.

Only for reads, which may be repeated without harm. Clock, sleep and jitter are values, so that tests wait for nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from trainkit.errors import UserError


class TransientError(Exception):
    """Trouble that may be gone in a moment; `str(error)` says what in a few words.

    `retry_after`: seconds that the other side asks to wait. `is_answer`: the other side itself said this.
    """

    def __init__(self, reason: str, *, retry_after: float = 0.0, is_answer: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.is_answer = is_answer


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait, and for how long to go on. Times are in seconds."""

    first: float = 1.0
    """Longest wait after the first failure; each further one doubles it."""
    cap: float = 30.0
    """Longest wait of all, unless the other side asks for more."""
    give_up_after: float = 1800.0
    """Time without any progress after which the trouble counts as permanent."""
    give_up_unheard_after: float = 60.0
    """The same while the other side has never been heard of: a network that is not there is seldom an outage."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[], float] = random.random
    """Uniform in [0, 1): the ranks of a run must not all come back at the same moment. Decides nothing but times."""


@dataclass
class Trouble:
    """One stretch of failures with a single thing, say a file."""

    what: str
    """Named in messages, such as "data/0.parquet of 'owner/name'"."""
    backoff: Backoff
    report: Callable[[str], None]
    advice: str = "check the network, or try again later"
    """What to do when it does not pass."""
    was_heard: bool = True
    """Whether there has been an answer before."""
    _failures: int = field(default=0, init=False)
    _began: float = field(default=0.0, init=False)

    def wait(self, error: TransientError) -> None:
        """Report the failure and wait for the next try; `UserError` when there has been no progress for too long."""
        now = self.backoff.clock()
        if not self._failures:
            self._began = now
        wait = min(self.backoff.cap, self.backoff.first * 2.0 ** min(self._failures, 30))
        # The upper half only: a wait of nearly nothing would be no backoff.
        wait = max(wait * (1 + self.backoff.jitter()) / 2, error.retry_after)
        self._failures += 1
        self.was_heard = self.was_heard or error.is_answer
        patience = self.backoff.give_up_after if self.was_heard else self.backoff.give_up_unheard_after
        if now - self._began + wait > patience:
            raise UserError(
                f"cannot read {self.what}: {error}, for {_duration(now - self._began)} now; {self.advice}"
            ) from error
        self.report(f"cannot read {self.what} ({error}); trying again in {wait:.0f} s")
        self.backoff.sleep(wait)

    def over(self) -> None:
        """Something arrived: the next failure begins a new stretch."""
        if self._failures > 2:
            self.report(f"reading {self.what} again after {_duration(self.backoff.clock() - self._began)}")
        self._failures = 0


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"


_T = TypeVar("_T")


def retry(action: Callable[[], _T], trouble: Trouble) -> _T:
    """The result of `action`, called again after each `TransientError` until `trouble` has had enough."""
    while True:
        try:
            result = action()
        except TransientError as error:
            trouble.wait(error)
        else:
            trouble.over()
            return result
