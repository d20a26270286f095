"""Logging: one JSON object a line on stderr, or text for a person, with secrets taken out on the way.

Loggers are the standard library's, named `tally.<folder>...`; facts go into `extra` and become fields of the object:

    log.info("receipt acknowledged", extra={"job": job_id, "step": 3})

What a peer or a user wrote to a model is never logged: fields by the names it travels under are replaced, whatever
they hold. Nothing here can see it inside a message text, so no message is ever built from it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any, Final, TextIO

REMOVED: Final = "[redacted]"
NOT_LOGGED: Final = "[not logged]"

CONTENT_FIELDS: Final = frozenset(
    {
        "prompt",
        "messages",
        "content",
        "text",
        "completion",
        "output",
        "input",
        "delta",
        "choices",
        "token_ids",
        "tokens",
    }
)
"""Names under which content travels in the OpenAI API and in our own frames."""

SECRET_FIELDS: Final = frozenset({"authorization", "api_key", "password", "secret", "private_key", "cookie"})
"""Names under which credentials travel; compared in lower case."""

NOISY: Final = (
    "aiohttp",
    "alembic",
    "asyncio",
    "httpcore",
    "httpx",
    "libp2p",
    "multiaddr",
    "sqlalchemy",
    "urllib3",
    "web3",
)
"""Loggers of libraries that are kept at WARNING: their debug output holds request bodies and raw transactions."""

_SHORTEST: Final = 8
"""Characters of the shortest secret that is taken out; shorter ones occur by chance in every line."""

_AUTHORIZATION: Final = re.compile(
    r"""(?ix) ( (?: proxy- )? authorization ["']? \s* [:=] \s* ["']? ) (?: (?: bearer | basic ) \s+ )? [^\s"',;}]+"""
)
_BEARER: Final = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}")

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every LogRecord carries; anything else came in by `extra`."""

_lock = threading.Lock()
_secrets: set[str] = set()
_pattern: re.Pattern[str] | None = None


def redact(secret: bytes | str) -> None:
    """Take a secret out of every line from now on: bytes in hexadecimal with or without 0x, text as it is; any case.

    Hexadecimal of 32 bytes alone says nothing (receipts and jobs are named by it), so only what is registered here
    is removed. Raises: ValueError for one shorter than 8 characters.
    """
    global _pattern
    text = secret.hex() if isinstance(secret, bytes) else secret.removeprefix("0x")
    if len(text) < _SHORTEST:
        raise ValueError(f"a secret of {len(text)} characters cannot be told from ordinary text")
    with _lock:
        _secrets.add(text)
        longest_first = sorted(_secrets, key=lambda item: (-len(item), item))
        _pattern = re.compile("(?:0x)?(?:" + "|".join(map(re.escape, longest_first)) + ")", re.IGNORECASE)


def clean(text: str) -> str:
    """A text without registered secrets and Authorization headers."""
    if _pattern is not None:
        text = _pattern.sub(REMOVED, text)
    text = _AUTHORIZATION.sub(rf"\1{REMOVED}", text)
    return _BEARER.sub(rf"\1{REMOVED}", text)


def _field(name: str, value: Any) -> Any:
    """A field as it may be written: JSON's types, bytes in hexadecimal, secrets and content replaced."""
    if isinstance(value, bool | int | float) or value is None:
        return value  # also under a name below: `tokens=32` is a count
    lowered = name.lower().replace("-", "_")
    if lowered in CONTENT_FIELDS:
        return NOT_LOGGED
    if lowered in SECRET_FIELDS:
        return REMOVED
    if isinstance(value, bytes):
        return clean(f"0x{value.hex()}")
    if isinstance(value, dict):
        return {clean(str(key)): _field(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_field("", item) for item in value]
    return clean(str(value))


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: _field(name, value) for name, value in vars(record).items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One line of JSON: time, level, logger, message, the fields of `extra`, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": clean(record.getMessage()),
        }
        for name, value in _extras(record).items():
            line[name if name not in line else f"{name}_"] = value
        if record.exc_info:
            line["exception"] = clean(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """One line for a person: time, level, message, fields; a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _extras(record).items())
        clock = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        text = f"{clock} {record.levelname.lower():7} {clean(record.getMessage())}{fields}"
        return f"{text}\n{clean(self.formatException(record.exc_info))}" if record.exc_info else text


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Marks the handler that `setup` installed, so that a second call replaces it and leaves others alone."""


def setup(level: str = "INFO", json: bool | None = None, stream: TextIO | None = None) -> None:
    """Send all logs to stderr. `json` None: JSON unless stderr is a terminal. Calling it again replaces the handler.

    Raises: ValueError for an unknown level.
    """
    out = sys.stderr if stream is None else stream
    handler = _StderrHandler(out)
    as_json = not out.isatty() if json is None else json
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.setLevel(level)
    for old in [old for old in root.handlers if isinstance(old, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
