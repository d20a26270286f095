"""The specification stands above the code that keeps it: each `# SPEC 4.2: ...` is a sentence of that section."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("protocol", "incentives", "node")
LEAST_QUOTES = 10
LEAST_WORDS = 4
"""A quote shorter than this would match by accident."""

_MARK = re.compile(r"#\s*SPEC\b[ \t]*(?P<section>[^:]*)(?P<colon>:?)(?P<text>.*)")
_GOES_ON = re.compile(r"#\s{3,}(?P<text>\S.*)")
_NUMBER = re.compile(r"\d+(\.\d+)?")
_START = re.compile(r"(?:#{2,}\s+)?(?P<number>\d+(?:\.\d+)?)\s+\S")


@dataclass(frozen=True)
class Quote:
    """A quote in the source. `section`: as written, `text`: with single spaces."""

    place: str
    section: str
    text: str


def plain(text: str) -> str:
    """With single spaces."""
    return " ".join(text.split())


def quotes(source: str, place: str) -> Iterator[Quote]:
    """Quotes in a module's comments. A quote goes on in comment lines below it that are indented by three spaces."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for line, comment in comments.items():
        found = _MARK.match(comment)
        if not found:
            continue
        section, text = found["section"].strip(), found["text"]
        if not found["colon"] or not _NUMBER.fullmatch(section):
            raise ValueError(f"{place}:{line}: {comment!r} is not of the form '# SPEC 4.2: quote'")
        below = line + 1
        while more := _GOES_ON.fullmatch(comments.get(below, "")):
            text, below = f"{text} {more['text']}", below + 1
        yield Quote(f"{place}:{line}", section, plain(text))


def sections(specification: str) -> dict[str, str]:
    """Number -> text, single-spaced. A number starts a heading or a paragraph; section 4 holds all of 4.1, 4.2, ..."""
    parts: dict[str, list[str]] = {}
    number, after_blank = "", True
    for line in specification.splitlines():
        started = _START.match(line)
        if started and (line.startswith("#") or (after_blank and "." in started["number"])):
            number = started["number"]
        elif line.startswith("#"):
            number = ""
        for key in {number, number.partition(".")[0]} - {""}:
            parts.setdefault(key, []).append(line)
        after_blank = not line.strip()
    return {key: plain("\n".join(lines)) for key, lines in parts.items()}


def mismatch(quote: Quote, spec: dict[str, str]) -> str | None:
    """Why the quote does not stand, or None when it does."""
    if quote.section not in spec:
        return f"{quote.place}: the specification has no section {quote.section}"
    if len(quote.text.split()) < LEAST_WORDS:
        return f"{quote.place}: {quote.text!r} is too short to be a quote"
    if not re.search(rf"(?<!\w){re.escape(quote.text)}(?!\w)", spec[quote.section]):
        return f"{quote.place}: section {quote.section} does not say {quote.text!r}"
    return None


def all_quotes() -> list[Quote]:
    """Every quote of the tree, by file."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return [quote for path in paths for quote in quotes(path.read_text(), str(path.relative_to(ROOT)))]


def test_every_quote_is_in_its_section() -> None:
    spec = sections((ROOT / "protocol" / "README.md").read_text())
    assert [wrong for quote in all_quotes() if (wrong := mismatch(quote, spec))] == []


def test_the_tree_quotes_the_specification() -> None:
    found = all_quotes()
    assert len(found) >= LEAST_QUOTES
    assert {quote.place.split("/")[0] for quote in found} == set(FOLDERS)


# ---------------------------------------------------------------------------------------------------- the search itself

SPEC = """# Title

## 4 A stream

4.1 One stream
is one *job*. See 4.2.

| 4.2 | is a cell |

### 4.2 Seed

The seed of a job is SHA-256.

4.10 Failover. Text
4.2 in a line that wraps.

## 5 Price
"""


def test_sections_are_told_apart() -> None:
    spec = sections(SPEC)
    assert spec["4.1"] == "4.1 One stream is one *job*. See 4.2. | 4.2 | is a cell |"
    assert spec["4.2"] == "### 4.2 Seed The seed of a job is SHA-256."
    assert spec["4.10"] == "4.10 Failover. Text 4.2 in a line that wraps."
    assert set(spec) == {"4", "4.1", "4.2", "4.10", "5"} and spec["4.2"] in spec["4"] and "Price" not in spec["4"]


@pytest.mark.parametrize(
    ("comment", "holds"),
    [
        ("# SPEC 4.1: One stream is one *job*.", True),
        ("# SPEC 4.1: One   stream\n#   is one", True),
        ("# SPEC 4: The seed of a job", True),
        ("# SPEC 4.2: One stream is one", False),  # another section
        ("# SPEC 4.1: one stream is one", False),  # another letter
        ("# SPEC 4.1: One stream is on", False),  # half a word
        ("# SPEC 4.1: One stream", False),  # too short
        ("# SPEC 4.9: One stream is one", False),  # no such section
        ("# SPEC 4.2: The seed of a job\n#   is SHA-512.", False),
    ],
)
def test_a_quote_holds_only_word_for_word(comment: str, holds: bool) -> None:
    (quote,) = quotes(f"x = 1\n{comment}\n# and a remark\ny = 2\n", "module.py")
    assert (mismatch(quote, sections(SPEC)) is None) == holds


@pytest.mark.parametrize("comment", ["# SPEC: One stream is one", "# SPEC 4.1 One stream is one", "# SPEC four: One"])
def test_a_malformed_mark_is_an_error(comment: str) -> None:
    with pytest.raises(ValueError, match="is not of the form"):
        list(quotes(comment, "module.py"))


def test_a_text_that_looks_like_a_quote_is_none() -> None:
    assert list(quotes('x = "# SPEC 9.9: not a comment"\n', "module.py")) == []
