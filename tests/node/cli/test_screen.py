"""What a terminal shows is the answer, whole and once, with the live line never among it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.cli import screen
from node.cli.screen import Meter, Plain, Silent, Terminal, screen_for


class FakeLive:
    """Records what scrolls up; `width` columns."""

    def __init__(self, width: int = 30) -> None:
        self.width = width
        self.printed: list[str] = []
        self.stopped = False
        self.console = self

    def print(self, text: Any, **_: Any) -> None:
        assert not self.stopped
        self.printed.append(text.plain)

    def update(self, renderable: Any) -> None:
        self.shown = renderable

    def stop(self) -> None:
        self.stopped = True


def terminal(monkeypatch: pytest.MonkeyPatch, width: int = 30) -> tuple[Terminal, FakeLive]:
    live = FakeLive(width)
    monkeypatch.setattr(screen, "_live", lambda *, stderr: live)
    return Terminal(), live


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab \n", max_size=50), max_size=12))
def test_every_character_is_shown_once_and_in_order(pieces: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shown, live = terminal(patch)
        for piece in pieces:
            shown.write(piece)
            shown.meter(Meter(tokens=3, rate=10.0, paid_wei=10**12, provider="0x" + "ab" * 20))
        shown.close()
    text = "".join(pieces)
    assert "".join(live.printed).replace("\n", "") == text.replace("\n", "")
    assert live.stopped and all(len(line) <= 29 for line in live.printed)


def test_the_live_line_names_tokens_speed_cost_and_provider() -> None:
    assert Meter().line() == "waiting for the first token"
    line = Meter(42, 61.4, 16_800_000_000_000, "0x1234567890" + "0" * 30).line()
    assert line == "42 tokens  61 tok/s  0.0000168 TALLY so far  0x12345678…"


def test_a_pipe_gets_the_text_and_one_newline(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Plain()
    for piece in ("a", "", "b\n", "c"):
        shown.write(piece)
    shown.close()
    shown.close()
    assert capsys.readouterr().out == "ab\nc\n"


def test_the_screen_fits_where_output_goes() -> None:
    assert isinstance(screen_for(quiet=True), Silent)
    assert isinstance(screen_for(quiet=False), Plain)
