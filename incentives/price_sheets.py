"""Price sheets of platforms outside the market, and what their prices are in wei, exactly.

The form is OpenRouter's GET /api/v1/models: `data[].id`, `context_length`, `top_provider.max_completion_tokens` and
`pricing`, whose values are USD per token (or per request) as decimal strings. Other platforms use the same form.
Source: OpenRouter API reference, "List available models".

USD and TALLY have no fixed rate: `tally_usd` is what one TALLY is worth in USD, a decimal that whoever compares has to
give. With it, in exact rational arithmetic and one rounding, up, so that nothing outside looks cheaper than it is:

    wei(p) = ceil(p / tally_usd * 10**18)              a price per token or request
    cost   = ceil(sum over lines of (count * price) / tally_usd * 10**18)      a whole job
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any, Final

import msgspec

from protocol.errors import TallyError
from protocol.units import WEI_PER_TALLY, Wei

MAX_SHEET_BYTES: Final = 16 << 20
"""Largest sheet read. Unit: bytes. OpenRouter's, with 400 models, is 1 MB."""

MAX_MODELS: Final = 20_000
"""Most models read of one sheet. OpenRouter lists 400; doubling it doubles what a foreign sheet can make us hold."""

MAX_PRICE_USD: Final = Decimal(1000)
"""Largest price believed. Unit: USD per token or request. The dearest token sold costs 0.0006."""

MAX_DECIMALS: Final = 30
"""Most digits behind the point of a price. Beyond any use, and it bounds the integers that follow."""

FREE: Final = Decimal(0)

_NUMBER: Final = re.compile(r"([0-9]{1,9})(?:\.([0-9]{0,40}))?(?:[eE]([+-]?[0-9]{1,2}))?")
_CHARGES: Final = ("prompt", "completion", "request", "input_cache_read", "internal_reasoning")


class SheetError(TallyError):
    """A price sheet that cannot be read; says why. Nothing of it was kept."""


@dataclass(frozen=True, slots=True)
class UsdPrices:
    """USD, exact: per token, and per request. Reasoning tokens are part of the output, cached ones part of the prompt.

    A platform that states no price of its own for cached or reasoning tokens charges them as prompt and output.
    """

    prompt: Decimal
    completion: Decimal
    request: Decimal
    cached: Decimal
    reasoning: Decimal


@dataclass(frozen=True, slots=True)
class OutsideModel:
    """One model of a sheet. `id`: its name there. `max_output` 0: not said. `extra`: charges that no text job meets
    (pictures, searches) by their names, as written."""

    id: str
    name: str
    context: int
    max_output: int
    usd: UsdPrices
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class PriceSheet:
    """A sheet as it was read. `source`: URL or file. `read_at`: Unix seconds. `skipped`: (model, why it is not here).

    Such sheets state no licence to publish their prices on: they are for the comparison of whoever imported them.
    """

    source: str
    read_at: int
    models: tuple[OutsideModel, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def model(self, name: str) -> OutsideModel | None:
        """The model of that id."""
        return next((model for model in self.models if model.id == name), None)


@dataclass(frozen=True, slots=True)
class WeiPrices:
    """The same in wei per token and per request, each rounded up on its own."""

    prompt: Wei
    completion: Wei
    request: Wei
    cached: Wei
    reasoning: Wei


@dataclass(frozen=True, slots=True)
class OutsideUsage:
    """What a job used there. `cached` is part of `prompt`, `reasoning` part of `completion`. Counts of tokens."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0


def parse_sheet(data: bytes, source: str, read_at: int) -> PriceSheet:
    """Read a sheet. Models without a fixed price, or with one that makes no sense, are skipped and named.

    Raises: SheetError when it is no such sheet, or none of its models can be read.
    """
    if len(data) > MAX_SHEET_BYTES:
        raise SheetError(f"the price sheet has {len(data)} bytes, at most {MAX_SHEET_BYTES} are read")
    try:
        # Numbers are read as they are written: 0.1 as a float would be another price.
        found = msgspec.json.Decoder(float_hook=Decimal).decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError, ArithmeticError, ValueError) as exc:
        raise SheetError(f"the price sheet is no JSON: {exc}") from exc
    rows = found.get("data") if isinstance(found, dict) else None
    if not isinstance(rows, list) or len(rows) > MAX_MODELS:
        raise SheetError('no price sheet in OpenRouter\'s form: {"data": [{"id": ..., "pricing": {...}}]} is expected')
    models: dict[str, OutsideModel] = {}
    skipped: list[tuple[str, str]] = []
    for row in rows:
        name = row.get("id") if isinstance(row, dict) else None
        if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
            skipped.append(("?", "it has no id"))
        elif name in models:
            skipped.append((name, "it is listed twice; the first counts"))
        else:
            try:
                models[name] = _model(name, row)
            except (ValueError, TypeError) as exc:
                skipped.append((name, str(exc)))
    if not models:
        why = f", such as {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise SheetError(f"the price sheet holds no model with a price ({len(skipped)} skipped{why})")
    return PriceSheet(source, read_at, tuple(models.values()), tuple(skipped))


def _model(name: str, row: Mapping[str, Any]) -> OutsideModel:
    """Raises: ValueError, TypeError saying what is wrong."""
    pricing = row.get("pricing")
    if not isinstance(pricing, dict):
        raise TypeError("it has no pricing")
    prompt, completion = (_usd(pricing, charge) for charge in ("prompt", "completion"))
    if prompt is None or completion is None:
        raise ValueError("it has no price per token")
    cached, reasoning = _usd(pricing, "input_cache_read"), _usd(pricing, "internal_reasoning")
    top = row.get("top_provider")
    top = top if isinstance(top, dict) else {}
    shown = row.get("name")
    return OutsideModel(
        id=name,
        name=shown[:256] if isinstance(shown, str) and shown.isprintable() else name,
        context=_count(row.get("context_length")) or _count(top.get("context_length")),
        max_output=_count(top.get("max_completion_tokens")),
        usd=UsdPrices(
            prompt,
            completion,
            _usd(pricing, "request") or FREE,
            prompt if cached is None else cached,
            # Zero is how these sheets say that reasoning is charged as output, never that it is free.
            reasoning or completion,
        ),
        extra=tuple(
            (charge, str(value)[:40])
            for charge, value in sorted(pricing.items())
            if charge not in _CHARGES and isinstance(value, str | int | Decimal) and str(value) not in ("0", "")
        ),
    )


def _count(value: Any) -> int:
    """A count of tokens; 0 where none is said."""
    return value if type(value) is int and 0 < value < 1 << 40 else 0


def _usd(pricing: Mapping[str, Any], charge: str) -> Decimal | None:
    """An exact price; None where none is said. Raises: ValueError for one that varies or is none."""
    value = pricing.get(charge)
    if value is None or value == "":
        return None
    text = str(value) if isinstance(value, str | int | Decimal) and not isinstance(value, bool) else "?"
    if text.startswith("-"):
        raise ValueError(f"its {charge} price is not fixed")  # routers that pick a model state -1
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"its {charge} price is no decimal")
    exact = Decimal(text.strip())
    if exact > MAX_PRICE_USD or len(match[2] or "") - int(match[3] or 0) > MAX_DECIMALS:
        raise ValueError(f"its {charge} price is out of range")
    return exact


# --------------------------------------------------------------------------------------------------------------- wei


def wei_up(usd: Decimal, tally_usd: Decimal) -> Wei:
    """USD in wei, rounded up. `tally_usd`: USD that one TALLY is worth, above zero. Raises: ValueError."""
    return _up(Fraction(usd), tally_usd)


def _up(usd: Fraction, tally_usd: Decimal) -> Wei:
    if not tally_usd.is_finite() or tally_usd <= 0:
        raise ValueError(f"{tally_usd} USD for one TALLY is no rate: it must be above zero")
    exact = usd * WEI_PER_TALLY / Fraction(tally_usd)
    return Wei(-(-exact.numerator // exact.denominator))


def wei_prices(usd: UsdPrices, tally_usd: Decimal) -> WeiPrices:
    """Each price in wei. Raises: ValueError for a rate that is none."""
    return WeiPrices(
        wei_up(usd.prompt, tally_usd),
        wei_up(usd.completion, tally_usd),
        wei_up(usd.request, tally_usd),
        wei_up(usd.cached, tally_usd),
        wei_up(usd.reasoning, tally_usd),
    )


def usd_cost(usd: UsdPrices, usage: OutsideUsage) -> Decimal:
    """What a job costs there, in USD, exact. Raises: ValueError for counts that do not fit together."""
    exact = _usd_cost(usd, usage)
    with localcontext(prec=100):  # the denominator is a power of ten, so the quotient is finite
        return Decimal(exact.numerator) / Decimal(exact.denominator)


def cost_up(usd: UsdPrices, usage: OutsideUsage, tally_usd: Decimal) -> Wei:
    """What a job costs there, in wei, rounded up once. Raises: ValueError."""
    return _up(_usd_cost(usd, usage), tally_usd)


def _usd_cost(usd: UsdPrices, usage: OutsideUsage) -> Fraction:
    if not 0 <= usage.cached <= usage.prompt or not 0 <= usage.reasoning <= usage.completion:
        raise ValueError(f"{usage} does not fit together")
    lines = (
        (usage.prompt - usage.cached, usd.prompt),
        (usage.cached, usd.cached),
        (usage.completion - usage.reasoning, usd.completion),
        (usage.reasoning, usd.reasoning),
        (1, usd.request),
    )
    return sum((count * Fraction(price) for count, price in lines), Fraction(0))
