"""How a setting is written and what it means: text, TOML value or flag in, exact integers and paths out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from protocol.errors import TallyError
from protocol.units import BPS, MAX_AMOUNT, WEI_PER_TALLY, Wei

MILLION: Final = 1_000_000
"""Prices are told per million tokens, as every price sheet of this trade does."""


PICO: Final = 10**12
"""Steps of one unit of an outside currency. A token costs about 10^-6 of one, and its share of energy less."""


@dataclass
class ConfigError(TallyError):
    """A setting that cannot be used: its key ("" when there is none), where it was written, and what is wrong."""

    key: str
    origin: str
    problem: str

    def __str__(self) -> str:
        return f"{self.key or 'configuration'} ({self.origin}): {self.problem}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value. `parse` raises ValueError or ArithmeticError; `form` says what is expected."""

    form: str
    parse: Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value.strip()


def _path(value: Any) -> Path:
    if isinstance(value, Path):
        return value.expanduser().absolute()
    if not _text(value):
        raise ValueError("the path is empty")
    return Path(_text(value)).expanduser().absolute()


def _optional_path(value: Any) -> Path | None:
    return None if value is None or value == "" else _path(value)


def _integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(_[0-9]+)*", value.strip()):
        return int(value)
    raise ValueError(f"{value!r} is no whole number")


def _decimal(value: Any) -> Decimal:
    """An exact decimal. A float is refused: 0.1 as a float is another number."""
    if isinstance(value, Decimal) and value.is_finite():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(_[0-9]+)*(\.[0-9]+)?", value.strip()):
        return Decimal(value.strip().replace("_", ""))
    raise ValueError(f"{value!r} is no decimal number")


def _wei(value: Any, per: int, what: str) -> Wei:
    """TALLY in, wei for one of `per` out. Raises: ValueError when that is no whole number of wei, or none at all."""
    amount = _decimal(value)
    with localcontext(prec=100):
        exact = amount * WEI_PER_TALLY / per
        if exact != exact.to_integral_value():
            raise ValueError(f"{amount} TALLY {what} is no whole number of wei")
        if not 0 <= exact <= MAX_AMOUNT:
            raise ValueError(f"{amount} TALLY {what} is out of range")
        return Wei(int(exact))


def _currency(value: Any) -> int:
    """An amount of some currency in, units of 10^-12 out. Raises: ValueError when that is no whole number of them."""
    with localcontext(prec=100):
        exact = _decimal(value) * PICO
        if exact != exact.to_integral_value() or not 0 <= exact <= MAX_AMOUNT:
            raise ValueError(f"{value!r} is no amount from 0 in steps of 10^-12")
        return int(exact)


def _bps(value: Any) -> int:
    """A factor in, basis points out."""
    exact = _decimal(value) * BPS
    if exact != exact.to_integral_value() or not 0 <= exact <= 100 * BPS:
        raise ValueError(f"{value!r} is no factor from 0 to 100 in steps of 0.0001")
    return int(exact)


_UNITS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def _duration(value: Any) -> int:
    match = re.fullmatch(r"([0-9]+) *([smhd]?)", str(value).strip()) if not isinstance(value, bool) else None
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{value!r} is no duration")
    return int(match[1]) * _UNITS[match[2]]


_SIZES: Final = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _size(value: Any) -> int:
    """Bytes. Powers of 1024 only: with both kinds of GB about, a bare one is a trap."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]iB|B|)", str(value).strip()) if value is not True else None
    exact = Decimal(match[1]) * _SIZES[match[2]] if match else Decimal(0)
    if not 0 < exact < 1 << 50 or exact != exact.to_integral_value():
        raise ValueError(f"{value!r} is no size in memory")
    return int(exact)


def _url(value: Any) -> str:
    parts = urlsplit(_text(value))
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
        raise ValueError(f"{value!r} is no URL")
    return _text(value)


def _texts(value: Any) -> tuple[str, ...]:
    """A list, or one text with commas between."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"{value!r} is no list")
    return tuple(item for item in map(_text, items) if item)


def _multiaddrs(value: Any) -> tuple[str, ...]:
    for item in (items := _texts(value)):
        if not item.startswith("/"):
            raise ValueError(f"{item!r} is no multiaddr")
    return items


def _bootstrap(value: Any) -> tuple[str, ...]:
    for item in (items := _multiaddrs(value)):
        if not re.search(r"/p2p/[A-Za-z0-9]+$", item):
            raise ValueError(f"{item!r} does not name its peer")
    return items


def _paths(value: Any) -> tuple[Path, ...]:
    """A list of paths, or one text with commas between."""
    items = [value] if isinstance(value, Path) else value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"{value!r} is no list of paths")
    return tuple(_path(item) for item in items if item != "")


def _yes_no(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no"):
        return value.strip().lower() in ("true", "yes")
    raise ValueError(f"{value!r} is neither true nor false")


def _rate(value: Any) -> Decimal | None:
    """An exact decimal above zero, None for none."""
    if value is None or value == "":
        return None
    rate = _decimal(value)
    if rate <= 0:
        raise ValueError(f"{value!r} is not above zero")
    return rate


def _names(value: Any) -> tuple[tuple[str, str], ...]:
    """`ours=theirs` pairs."""
    pairs = tuple(item.partition("=") for item in _texts(value))
    if any(not (ours and mark and theirs) for ours, mark, theirs in pairs):
        raise ValueError(f"{value!r} is no list of NAME=THEIRS")
    return tuple((ours.strip(), theirs.strip()) for ours, _, theirs in pairs)


def _optional_url(value: Any) -> str:
    return "" if value is None or value == "" else _url(value)


def count(low: int, high: int) -> Kind:
    """A whole number within bounds."""

    def parse(value: Any) -> int:
        number = _integer(value)
        if not low <= number <= high:
            raise ValueError(f"{number} is out of range")
        return number

    return Kind(f"a whole number from {low} to {high}", parse)


def choice(*options: str) -> Kind:
    """One of several words, in any case."""

    def parse(value: Any) -> str:
        for option in options:
            if option.lower() == _text(value).lower():
                return option
        raise ValueError(f"{value!r} is none of them")

    return Kind(f"one of {', '.join(options)}", parse)


text: Final = Kind("text", _text)
path: Final = Kind("a path", _path)
paths: Final = Kind("paths, such as models/a,models/b", _paths)
optional_path: Final = Kind("a path", _optional_path)
port: Final = count(0, 65_535)
url: Final = Kind("a URL such as http://127.0.0.1:8545", _url)
optional_url: Final = Kind("a URL such as http://127.0.0.1:8000/v1, or empty", _optional_url)
yes_no: Final = Kind("true or false", _yes_no)
rate: Final = Kind('a decimal above zero such as "0.35"', _rate)
names: Final = Kind("pairs such as Llama-3.1-8B-Instruct=meta-llama/llama-3.1-8b-instruct", _names)
multiaddrs: Final = Kind("multiaddrs such as /ip4/203.0.113.7/tcp/4001", _multiaddrs)
bootstrap: Final = Kind("multiaddrs such as /ip4/203.0.113.7/tcp/4001/p2p/16Uiu2...", _bootstrap)
duration: Final = Kind("a duration above zero such as 90s, 10m, 2h or 1d (a bare number is seconds)", _duration)
size: Final = Kind("a size such as 512MiB, 2GiB or 1.5GiB (a bare number is bytes)", _size)
tally: Final = Kind('TALLY as a decimal such as "1.5", with at most 18 decimals', lambda v: _wei(v, 1, "in all"))
currency: Final = Kind('an amount as a decimal such as "0.31", with at most 12 decimals', _currency)
factor: Final = Kind('a factor as a decimal such as "1.5", with at most 4 decimals', _bps)
price: Final = Kind(
    'TALLY per million tokens as a decimal such as "0.25", with at most 12 decimals',
    lambda v: _wei(v, MILLION, "per million tokens"),
)
