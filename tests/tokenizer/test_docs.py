from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cli import train_tokenizer

DOCUMENT = Path(__file__).parents[2] / "docs" / "tokenizer.md"


def test_everything_in_the_document_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "is set by the document")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(DOCUMENT), "exec"), names)
            continue
        for line in block.splitlines():
            uv, run, command, *arguments = shlex.split(line, comments=True)
            assert (uv, run, command) == ("uv", "run", "transformerlm-train-tokenizer")
            assert train_tokenizer.main(arguments) == 0
    text = "Once upon a time"
    assert names["ids"].tolist() == names["encoding"].encode(text)
    assert names["tokenizer"].decode(names["ids"]) == text
