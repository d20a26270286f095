"""Logs: one object a line, and neither secrets nor content in any of them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from node import log as tally_log
from node.log import NOT_LOGGED, REMOVED, clean, redact, setup

SECRET = bytes(range(200, 232))


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tally_log, "_secrets", set())
    monkeypatch.setattr(tally_log, "_pattern", None)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _line(message: str, *args: Any, **extra: Any) -> dict[str, Any]:
    stream = io.StringIO()
    setup("DEBUG", json=True, stream=stream)
    logging.getLogger("tally.test").info(message, *args, extra=extra)
    (text,) = stream.getvalue().splitlines()
    line: dict[str, Any] = json.loads(text)
    return line


def test_a_line_is_an_object_with_the_facts_as_fields() -> None:
    line = _line("job %s is\ndone", 5, job=b"\x01\x02", step=3, paid=2**90, tier=None, where={"peer": "p", "n": 1.5})
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "INFO",
        "logger": "tally.test",
        "message": "job 5 is\ndone",
        "job": "0x0102",
        "step": 3,
        "paid": 2**90,
        "tier": None,
        "where": {"peer": "p", "n": 1.5},
    }


def test_a_registered_secret_is_taken_out_wherever_it_stands() -> None:
    redact(SECRET)
    redact("hunter2-and-more")
    forms = [SECRET.hex(), f"0x{SECRET.hex()}", f"0X{SECRET.hex().upper()}", "hunter2-and-more", f"a{SECRET.hex()}b"]
    for form in forms:
        line = _line("key %s", form, key=form, nested={form: [form]}, raw=SECRET)
        assert SECRET.hex() not in json.dumps(line).lower() and "hunter2" not in json.dumps(line)
        assert REMOVED in line["message"] and line["raw"] == REMOVED


def test_other_hexadecimal_of_32_bytes_stays_because_jobs_are_named_by_it() -> None:
    redact(SECRET)
    digest = "0x" + "ab" * 32
    assert _line("receipt %s", digest)["message"] == f"receipt {digest}"


def test_a_secret_in_an_exception_is_taken_out() -> None:
    redact(SECRET)
    for as_json in (True, False):
        stream = io.StringIO()
        setup("INFO", json=as_json, stream=stream)
        try:
            raise ValueError(f"bad key 0x{SECRET.hex()}")
        except ValueError:
            logging.getLogger("tally.test").exception("failed")
        assert SECRET.hex() not in stream.getvalue()
        assert "ValueError" in stream.getvalue() and REMOVED in stream.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer sk-tally-abcdefgh",
        "authorization=sk-tally-abcdefgh",
        "{'Authorization': 'Bearer sk-tally-abcdefgh', 'x': 1}",
        '{"authorization": "Basic sk-tally-abcdefgh"}',
        "Proxy-Authorization: sk-tally-abcdefgh",
        "got bearer sk-tally-abcdefgh from the client",
    ],
)
def test_credentials_of_requests_are_taken_out(text: str) -> None:
    assert "abcdefgh" not in clean(text)
    assert REMOVED in clean(text)


def test_fields_that_carry_content_or_credentials_are_not_written() -> None:
    line = _line(
        "m", prompt="tell me", messages=[{"content": "x"}], tokens=[1, 2], request={"input": "x", "model": "m"}
    )
    assert line["prompt"] == line["messages"] == line["tokens"] == line["request"]["input"] == NOT_LOGGED
    assert line["request"]["model"] == "m"
    line = _line("m", tokens=32, api_key="k", headers={"Authorization": "k", "Cookie": "c"})
    assert line["tokens"] == 32, "a count is no content"
    assert line["api_key"] == line["headers"]["Authorization"] == line["headers"]["Cookie"] == REMOVED


def test_text_on_a_terminal_json_elsewhere_and_never_twice() -> None:
    terminal, pipe = _Terminal(), io.StringIO()
    setup(stream=terminal)
    logging.getLogger("tally.test").warning("slow", extra={"ms": 5})
    setup(stream=pipe)
    logging.getLogger("tally.test").warning("slow", extra={"ms": 5})
    assert terminal.getvalue().endswith("warning slow ms=5\n") and terminal.getvalue().count("\n") == 1
    assert json.loads(pipe.getvalue())["ms"] == 5


def test_levels_and_noisy_libraries() -> None:
    stream = io.StringIO()
    setup("DEBUG", json=True, stream=stream)
    logging.getLogger("web3.providers").debug("raw transaction")
    logging.getLogger("tally.test").debug("ours")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["ours"]
    with pytest.raises(ValueError, match="LOUD"):
        setup("LOUD")


def test_a_secret_too_short_to_tell_is_refused() -> None:
    with pytest.raises(ValueError, match="6 characters") as caught:
        redact(b"abc")
    assert "abc" not in str(caught.value)
