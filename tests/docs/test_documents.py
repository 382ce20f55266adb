"""What else the documents show: Python, configurations, links."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import pytest
import tomli
from annotated_types import Ge
from markdown_it import MarkdownIt

from config.schemas import COMMANDS
from config.tables import fields, kinds
from tests.docs.documents import DOCUMENTS, ROOT, blocks
from tests.docs.test_commands_in_docs import MY_TOML

PYTHON_ELSEWHERE: Mapping[str, str] = {
    "docs/inference.md": "tests/inference/test_documentation.py::test_what_is_python_runs",
    "docs/tokenizer.md": "tests/tokenizer/test_docs.py::test_everything_in_the_document_runs_as_it_is_printed",
    "docs/profiling.md": "tests/profiling/test_documentation.py::test_what_is_python_runs",
    "docs/extending.md": "tests/docs/test_extending.py::test_the_steps_work",
    "trainkit/README.md": "tests/docs/test_documents.py::test_the_parts_of_the_example_are_its_parts",
}
"""Documents whose Python this module does not run, and the test that does."""
NAMES: Mapping[str, Any] = {"Annotated": Annotated, "Ge": Ge}
"""What a part of a module needs around it."""
NEED_RUNS = {"README.md", "docs/rope.md"}
PYTHON = sorted({document for document in DOCUMENTS for block in blocks(document) if block.language == "python"})
PAGES = [*DOCUMENTS, "CHANGELOG.md", "benchmarking/RESULTS.md"]


@pytest.mark.parametrize("document", PYTHON_ELSEWHERE)
def test_the_test_that_is_named_exists(document: str) -> None:
    path, _, function = PYTHON_ELSEWHERE[document].partition("::")
    assert document in PYTHON
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE), PYTHON_ELSEWHERE[document]


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(document, marks=pytest.mark.slow if document in NEED_RUNS else ())
        for document in PYTHON
        if document not in PYTHON_ELSEWHERE
    ],
)
def test_what_is_python_runs(
    document: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(request.getfixturevalue("workspace") if document in NEED_RUNS else tmp_path)
    Path("my.toml").write_text(MY_TOML)
    names = dict(NAMES)
    for block in blocks(document):
        if block.language == "python":
            # Lines are those of the document, for the traceback.
            exec(compile("\n" * (block.line - 1) + block.text, ROOT / document, "exec"), names)


def test_the_parts_of_the_example_are_its_parts() -> None:
    """trainkit/README.md shows examples/mlp.py, which a test runs, without its annotations."""
    example = {line.strip() for line in (ROOT / "examples" / "mlp.py").read_text().splitlines()}
    (block,) = (block for block in blocks("trainkit/README.md") if block.language == "python")
    shown = [line.partition("#")[0].strip() for line in block.text.splitlines()]
    bodies = [line for line in shown if line and "..." not in line and not line.startswith("def ")]
    assert len(bodies) > 8 and not [line for line in bodies if line not in example]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_is_toml_is_known(document: str) -> None:
    for block in blocks(document):
        if block.language == "toml":
            for table, settings in tomli.loads(block.text).items():
                if isinstance(settings, dict):
                    assert settings.keys() <= known_settings(table), f"{block}: [{table}]"


def known_settings(table: str) -> set[str]:
    annotations = [fields(schema)[table] for schema in COMMANDS.values() if table in fields(schema)]
    return {name for annotation in annotations for kind in kinds(annotation) for name in fields(kind)}


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document: str) -> None:
    for target in links((ROOT / document).read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        page = (ROOT / document).parent / path if path else ROOT / document
        assert page.exists(), f"{document}: {target}"
        if anchor:
            assert anchor in anchors(page.read_text(encoding="utf-8")), f"{document}: {target}"


def links(text: str) -> list[str]:
    """Relative ones."""
    tokens = [child for token in MarkdownIt("commonmark").enable("table").parse(text) for child in token.children or ()]
    targets = [str(token.attrs.get("href") or token.attrs.get("src") or "") for token in tokens]
    return [target for target in targets if target and not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """As GitHub names headings: lower case, without punctuation, blanks as hyphens."""
    tokens = MarkdownIt("commonmark").parse(text)
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
