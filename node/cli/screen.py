"""Where an answer goes while it comes: text to stdout, a live line of tokens, speed and cost to a terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from node.cli import money
from node.cli.tables import short

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

REFRESH_HZ: Final = 8
"""How often the live line is drawn. Unit: per second. Faster than one reads; each drawing costs a millisecond."""


@dataclass(slots=True)
class Meter:
    """What the live line shows. `paid_wei`: acknowledged so far, None before anything is known. `rate`: tokens/s."""

    tokens: int = 0
    rate: float = 0.0
    paid_wei: int | None = None
    provider: str = ""

    def line(self) -> str:
        """`42 tokens  61 tok/s  0.0000168 TALLY  0x12345678…`."""
        if not self.tokens:
            return "waiting for the first token"
        parts = [f"{self.tokens} tokens", f"{self.rate:.0f} tok/s"]
        if self.paid_wei is not None:
            parts.append(f"{money.amount(self.paid_wei)} so far")
        if self.provider:
            parts.append(short(self.provider))
        return "  ".join(parts)


class Screen(Protocol):
    """An answer's way to the user."""

    def write(self, text: str) -> None:
        """More of the answer."""
        ...

    def meter(self, meter: Meter) -> None:
        """The live line, where there is one."""
        ...

    def close(self) -> None:
        """The answer is over, whole or not. Idempotent."""
        ...


class Plain:
    """Text to stdout as it comes, nothing else: for pipes."""

    def __init__(self) -> None:
        self._last = "\n"

    def write(self, text: str) -> None:
        if text:
            self._last = text[-1]
            sys.stdout.write(text)
            sys.stdout.flush()

    def meter(self, meter: Meter) -> None:
        pass

    def close(self) -> None:
        if self._last != "\n":
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._last = "\n"


class Silent:
    """Keeps quiet: the caller prints the whole at the end."""

    def write(self, text: str) -> None:
        pass

    def meter(self, meter: Meter) -> None:
        pass

    def close(self) -> None:
        pass


class Metered(Plain):
    """Text to stdout, which is no terminal; the live line on stderr, which is one."""

    def __init__(self) -> None:
        super().__init__()
        self._live = _live(stderr=True)

    def meter(self, meter: Meter) -> None:
        self._live.update(_dim(meter.line()))

    def close(self) -> None:
        self._live.stop()
        super().close()


class Terminal:
    """Text and live line share one terminal: whole lines scroll up, the unfinished one stands above the live line."""

    def __init__(self) -> None:
        self._live = _live(stderr=False)
        self._tail = ""
        self._status = ""

    def write(self, text: str) -> None:
        self._tail += text
        width = max(20, self._live.console.width - 1)
        while True:
            line, newline, rest = self._tail.partition("\n")
            if len(line) > width:
                # A line is let go in pieces: a live region higher than the terminal would be cut off.
                cut = line.rfind(" ", 0, width) + 1 or width
                line, rest = line[:cut], line[cut:] + newline + rest
            elif not newline:
                break
            self._print(line)
            self._tail = rest
        self._draw()

    def meter(self, meter: Meter) -> None:
        self._status = meter.line()
        self._draw()

    def close(self) -> None:
        tail, self._tail = self._tail, ""
        self._draw()
        if tail:
            self._print(tail)
        self._live.stop()

    def _print(self, line: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(line), soft_wrap=True)

    def _draw(self) -> None:
        from rich.console import Group
        from rich.text import Text

        status = _dim(self._status)
        self._live.update(Group(Text(self._tail), status) if self._tail else status)


def _dim(text: str) -> Text:
    from rich.text import Text

    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _live(*, stderr: bool) -> Live:
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(stderr=stderr), transient=True, refresh_per_second=REFRESH_HZ, redirect_stdout=False)
    live.start()
    return live


def screen_for(*, quiet: bool) -> Screen:
    """The screen that fits where stdout and stderr go. `quiet`: only the end result is wanted."""
    if quiet:
        return Silent()
    out, err = sys.stdout.isatty(), sys.stderr.isatty()
    if out and err:
        return Terminal()
    return Metered() if err else Plain()
