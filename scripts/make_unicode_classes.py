"""Write `transformerlm/tokenizer/unicode_classes.py`: which code points are letters, numbers and white space.

The tables are asked of tiktoken (a development dependency), because ids must equal its ids. Run it again after an
upgrade of tiktoken; `tests/tokenizer/test_pretokenizer.py` fails when the two have drifted apart.

    uv run python scripts/make_unicode_classes.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import tiktoken

OUTPUT = Path(__file__).parent.parent / "transformerlm" / "tokenizer" / "unicode_classes.py"
CLASSES = {"LETTERS": r"\p{L}", "NUMBERS": r"\p{N}", "WHITE_SPACE": r"\s"}
CLASSES |= {"UPPERCASE": r"[\p{Lu}\p{Lt}]", "LOWERCASE": r"\p{Ll}", "MARKS": r"\p{M}"}
UNICODE_VERSIONS = ("14.0", "15.0", "15.1", "16.0", "17.0", "18.0", "19.0", "20.0")

SURROGATES = range(0xD800, 0xE000)
EVERY_CHARACTER = "".join(chr(code) for code in range(0x110000) if code not in SURROGATES)

TEMPLATE = '''"""The character classes that the pre-tokenizer's pattern names, pinned to Unicode {version}.

Written by `scripts/make_unicode_classes.py` from tiktoken {tiktoken}, whose ids ours must equal. They are pinned
because the standard library's `unicodedata` changes with the version of Python, and ids must not.
A table lists inclusive ranges of code points in hexadecimal.
"""

from __future__ import annotations

UNICODE_VERSION = "{version}"

{tables}

def parse_ranges(table: str) -> list[tuple[int, int]]:
    """The inclusive ranges of code points that `table` lists, ascending."""
    bounds = (item.partition("-") for item in table.split())
    return [(int(first, 16), int(last or first, 16)) for first, _, last in bounds]
'''


def matching_characters(pattern: str) -> str:
    """Every character that `pattern` matches, by tiktoken's regex engine (text between matches gets no tokens)."""
    encoding = tiktoken.Encoding(
        name="probe", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    return encoding.decode(encoding.encode_ordinary(EVERY_CHARACTER))


def newest_version() -> str:
    """The newest Unicode version whose `Age` property tiktoken's engine knows: the version of its tables."""
    known = []
    for version in UNICODE_VERSIONS:
        try:
            matching_characters(rf"\p{{Age={version}}}")
        except ValueError:
            break
        known.append(version)
    return known[-1]


def to_ranges(characters: str) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for code in map(ord, characters):
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return ranges


def format_table(name: str, pattern: str) -> str:
    items = (
        f"{first:X}" if first == last else f"{first:X}-{last:X}"
        for first, last in to_ranges(matching_characters(pattern))
    )
    lines = textwrap.fill(" ".join(items), width=120, break_on_hyphens=False, break_long_words=False)
    return f'{name} = """\n{lines}\n"""\n"""`{pattern.replace(chr(92), chr(92) * 2)}`"""\n'


def main() -> None:
    tables = "\n".join(format_table(name, pattern) for name, pattern in CLASSES.items())
    OUTPUT.write_text(TEMPLATE.format(version=newest_version(), tiktoken=tiktoken.__version__, tables=tables))
    print(f"wrote {OUTPUT.name}: Unicode {newest_version()} as tiktoken {tiktoken.__version__} has it")


if __name__ == "__main__":
    main()
