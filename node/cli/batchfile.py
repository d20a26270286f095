"""A batch's input: one request a line, in OpenAI's batch format, checked as a whole before anything is spent.

A line is `{"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}`. Only where each line
stands is kept in memory; its body is read again when its turn comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from node.cli.failures import CommandFailed
from node.gateway.embeddings import parse_embeddings
from node.gateway.errors import ApiError
from node.gateway.requests import parse_chat, parse_completion

MAX_LINES: Final = 50_000
"""Lines of one batch, as at OpenAI. Each keeps some 300 bytes in memory."""

MAX_LINE_BYTES: Final = 1 << 20
"""Longest line. Unit: bytes. The gateway takes no larger body."""

MAX_ID_CHARS: Final = 512
"""Longest custom_id. Unit: characters. It is written into three files for each line."""

_EMBEDDINGS: Final = "/v1/embeddings"
_PARSERS: Final[Mapping[str, Callable[[dict[str, Any]], object]]] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
    _EMBEDDINGS: parse_embeddings,
}


@dataclass(frozen=True, slots=True)
class Line:
    """One valid line. `number`: from 1. `start`, `size`: where it stands in the file, bytes."""

    number: int
    custom_id: str
    url: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class BadLine:
    """One line that cannot be sent. `custom_id` None: it has none that could be read."""

    number: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class BatchFile:
    """A whole input. `sha256`: of the file, hexadecimal: a batch is continued for the same file only."""

    path: Path
    sha256: str
    lines: tuple[Line, ...]
    bad: tuple[BadLine, ...]

    def body(self, line: Line) -> dict[str, Any]:
        """What is sent for a line: its body, at the flex tier, as a batch job where it generates text.

        Raises: CommandFailed when the file changed since it was checked.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(line.start)
                found = msgspec.json.decode(file.read(line.size))
            if found["custom_id"] == line.custom_id:
                return _sent(found["body"], line.url)
        except (OSError, msgspec.MsgspecError, KeyError, TypeError):
            pass
        raise CommandFailed(
            f"{self.path} changed while the batch ran, at line {line.number}",
            kept="finished lines are in the output file",
            do="leave the file as it is while a batch runs, and start it again",
        )


def read_batch(path: Path) -> BatchFile:
    """Check every line. Raises: CommandFailed when the file cannot be read or has too many lines."""
    digest = hashlib.sha256()
    lines: list[Line] = []
    bad: list[BadLine] = []
    seen: dict[str, int] = {}
    start = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if number > MAX_LINES:
                    raise CommandFailed(
                        f"{path} has more than {MAX_LINES} lines", kept="nothing was sent", do="split the file"
                    )
                digest.update(raw)
                item = _checked(raw, number, start, seen) if raw.strip() else None
                start += len(raw)
                if isinstance(item, Line):
                    lines.append(item)
                elif item is not None:
                    bad.append(item)
    except OSError as exc:
        raise CommandFailed(f"{path} cannot be read: {exc.strerror}", kept="nothing was sent") from exc
    return BatchFile(path, digest.hexdigest(), tuple(lines), tuple(bad))


def _checked(raw: bytes, number: int, start: int, seen: dict[str, int]) -> Line | BadLine:
    if len(raw) > MAX_LINE_BYTES:
        return BadLine(number, None, "line_too_long", f"the line has more than {MAX_LINE_BYTES} bytes")
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        return BadLine(number, None, "invalid_json_line", f"the line is no JSON: {exc}")
    if not isinstance(found, dict):
        return BadLine(number, None, "invalid_json_line", "the line must be a JSON object")
    custom_id = found.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        said = f"custom_id must be a text of 1 to {MAX_ID_CHARS} characters"
        return BadLine(number, None, "missing_custom_id", said)
    if custom_id in seen:
        said = f"custom_id is that of line {seen[custom_id]}; each line needs its own"
        return BadLine(number, custom_id, "duplicate_custom_id", said)
    seen[custom_id] = number
    problem = _problem(found)
    if problem is not None:
        return BadLine(number, custom_id, *problem)
    return Line(number, custom_id, found["url"], start, len(raw))


def _problem(found: dict[str, Any]) -> tuple[str, str] | None:
    """(code, message) of what is wrong with a line's request, or None."""
    url, body = found.get("url"), found.get("body")
    if found.get("method") != "POST":
        return "invalid_method", "method must be POST"
    if not isinstance(url, str) or url not in _PARSERS:
        return "invalid_url", f"url must be one of {', '.join(_PARSERS)}"
    if not isinstance(body, dict):
        return "invalid_request", "body must be an object"
    if body.get("stream"):
        return "invalid_request", "stream has no meaning in a batch"
    try:
        _PARSERS[url](_sent(body, url))
    except ApiError as exc:
        return exc.code, exc.message
    return None


def _sent(body: dict[str, Any], url: str) -> dict[str, Any]:
    given = body.get("x_tally")
    if given is not None and not isinstance(given, dict):
        return body  # the parser says what is wrong with it
    terms = {name: value for name, value in (given or {}).items() if name not in ("tier", "batch", "dry_run")}
    terms |= {"tier": "flex"} if url == _EMBEDDINGS else {"batch": True}
    plain = {name: value for name, value in body.items() if name not in ("service_tier", "stream", "stream_options")}
    return {**plain, "x_tally": terms}
