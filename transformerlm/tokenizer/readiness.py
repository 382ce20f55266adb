"""When the compiled kernels are loaded, and where they are kept. Importing this file imports no Numba.

Numba takes half a second to import, and the first compilation on a machine takes much longer. A text of a few words
should not wait for either: the plain path encodes it in microseconds, with the same ids. So the kernels are loaded once
a process has given the plain path as much work as loading them costs. Whatever is still to come, that takes at most
twice the time of the better choice.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from types import ModuleType

KERNELS = Path(__file__).parent / "kernels"

LOADING_COST = 2 << 20
"""Bytes that the plain path encodes in the time in which compiled kernels are loaded from disk."""
COMPILATION_COST = 32 << 20
"""The same for their first compilation."""

PURPOSE = {"compiled_encoder": "encoding", "compiled_trainer": "training"}

_lock = RLock()
_loaded: dict[str, ModuleType] = {}
_plain_work: dict[str, int] = {}


def pays(name: str, work: int) -> bool:
    """Whether `load(name)` costs less than what `work`, in bytes of text, and all before it would have cost without."""
    if name in _loaded:
        return True
    with _lock:
        _plain_work[name] = _plain_work.get(name, 0) + work
        return _plain_work[name] >= (LOADING_COST if _marker(name).exists() else COMPILATION_COST)


def load(name: str) -> ModuleType:
    """The module `transformerlm.tokenizer.<name>`, its kernels loaded or, where they have never been, compiled."""
    with _lock:
        if name not in _loaded:
            with no_garbage():
                module = importlib.import_module(f"transformerlm.tokenizer.{name}")
            if not _marker(name).exists():
                _compile(name, module)
            _loaded[name] = module
        return _loaded[name]


@contextmanager
def no_garbage() -> Generator[None]:
    """While ten thousands of objects are made that all stay: the collector would look them through again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _compile(name: str, module: ModuleType) -> None:
    """Compile by use, and say so: nobody should wait for long without knowing for what."""
    place = cache_directory()
    _say(f"compiling the tokenizer's kernels for {PURPOSE[name]}, once on this machine: about 10 s, kept in {place}")
    start = time.monotonic()
    module.warm_up()
    _marker(name).touch()
    _say(f"compiled them in {time.monotonic() - start:.1f} s")


def _say(line: str) -> None:
    # In one write, with its line end: a progress bar on the same terminal then moves below it whole.
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@cache
def cache_directory() -> Path:
    """Where compiled kernels are kept: in `NUMBA_CACHE_DIR`, else in the user's cache; the package may be read-only.

    Numba notices a change only in the file of the function that it loads, not in the functions which that one calls. So
    the folder's name is a hash of all kernels.
    """
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(KERNELS.glob("*.py")):
        digest.update(path.read_bytes())
    directory = _cache_home() / f"tokenizer-{digest.hexdigest()[:16]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError:  # compiled anew by each process, which is still better than not at all
        directory = Path(tempfile.mkdtemp(prefix="tokenizer-kernels-"))
    return directory


def _cache_home() -> Path:
    if place := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(place)
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or tempfile.gettempdir())
    elif sys.platform == "darwin":
        home = Path("~/Library/Caches").expanduser()
    else:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "transformerlm"


def _marker(name: str) -> Path:
    """Exists once all kernels of `name` have been compiled."""
    return cache_directory() / f"{name}.compiled"
