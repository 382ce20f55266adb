"""Tables in a page that a command writes: between two comments, so that the page around them is anyone's."""

from __future__ import annotations

from pathlib import Path

from trainkit.artifacts import publish_file
from trainkit.errors import UserError


def marks(name: str) -> tuple[str, str]:
    """The comments before and after the table called `name`."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def between_marks(path: Path, name: str) -> str:
    """What stands between them; a file without them is a `UserError`."""
    return _split(path, name)[1].strip("\n")


def write_between_marks(path: Path, name: str, text: str) -> None:
    """Replace what stands between them; a file without them is a `UserError`, and is left as it is."""
    before, _, after = _split(path, name)
    begin, end = marks(name)
    publish_file(path, f"{before}{begin}\n{text}\n{end}{after}")


def _split(path: Path, name: str) -> tuple[str, str, str]:
    """Before, between and after."""
    begin, end = marks(name)
    if not path.is_file():
        raise UserError(f"there is no file {path} to put a table into")
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    inside, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{path} does not hold {begin} and {end}; add the two lines where the table belongs")
    return before, inside, after
