from __future__ import annotations

from pathlib import Path

import pytest

from cli.marks import between_marks, write_between_marks
from trainkit.errors import UserError


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- one: begin -->\n<!-- one: end -->\n<!-- two: begin -->\nold\n<!-- two: end -->\nafter"
    )
    assert between_marks(page, "one") == "" and between_marks(page, "two") == "old"
    write_between_marks(page, "two", "| new |\n|---|")
    assert between_marks(page, "one") == "" and between_marks(page, "two") == "| new |\n|---|"
    text = page.read_text()
    assert text.startswith("before\n<!-- one: begin -->") and text.endswith("\n<!-- two: end -->\nafter")
    write_between_marks(page, "two", "| new |\n|---|")
    assert page.read_text() == text


@pytest.mark.parametrize("content", ["", "<!-- t: begin -->", "<!-- t: end -->\n<!-- t: begin -->"])
def test_a_page_without_the_marks_is_left_alone(tmp_path: Path, content: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(content)
    with pytest.raises(UserError, match="does not hold"):
        write_between_marks(page, "t", "table")
    assert page.read_text() == content


def test_a_page_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        write_between_marks(tmp_path / "page.md", "t", "table")
    assert not any(tmp_path.iterdir())
