"""What the injected library (nvtx_recorder.c) wrote down, as paths of nested ranges; and how to build it."""

from __future__ import annotations

import shutil
import site
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest


def build_library(folder: Path) -> Path:
    """Compile it against the NVTX headers that come with CUDA's wheels; skips where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    headers = [path.parents[1] for root in site.getsitepackages() for path in Path(root).rglob("nvtx3/nvToolsExt.h")]
    if not headers:
        pytest.skip("no NVTX headers: they come with the CUDA builds of PyTorch")
    library, source = folder / "nvtx_recorder.so", Path(__file__).with_name("nvtx_recorder.c")
    flags = ["-std=gnu11", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, f"-I{headers[0]}", str(source), "-o", str(library)], check=True)
    return library


def paths_of_ranges(record: Path) -> set[str]:
    """`step/forward` for a forward inside a step; fails where a thread pops what it has not pushed, or never pops."""
    stacks: defaultdict[str, list[str]] = defaultdict(list)
    paths: set[str] = set()
    for line in record.read_text().splitlines():
        process, thread, action, domain, *name = line.split(" ")
        if domain != "transformerlm":
            continue  # NCCL, for instance, has ranges of its own
        stack = stacks[f"{process} {thread}"]
        if action == "push":
            stack += name
            paths.add("/".join(stack))
        else:
            assert stack, line
            stack.pop()
    assert not any(stacks.values()), stacks
    return paths
