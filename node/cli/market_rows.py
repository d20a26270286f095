"""The rows of `tally market`: each offer's figures over the fixed basket, and of outside platforms' sheets beside them.

Figures are exact integers of the row's unit: wei of TALLY, or 10^-18 of an outside sheet's currency. None: not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Decimal
from pathlib import PurePath
from typing import Any, Final
from urllib.parse import urlsplit

from incentives import basket
from incentives.price_sheets import OutsideModel, PriceSheet, wei_prices
from protocol.bundle_json import Node
from protocol.errors import FieldOutOfRange, TierNotOffered
from protocol.messages import Tariff
from protocol.metering import Usage
from protocol.tariff import Basis, tier_terms
from protocol.units import BPS, Tier

TALLY: Final = "TALLY"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What figures are for. `output` None: no job is priced. `prompt` None: each tokenizer counts it."""

    tier: Tier
    prompt: int | None = None
    cached: int = 0
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One offer or one line of an outside sheet.

    `prices` None: the tier is not offered. `counted`: reference tokens by its own tokenizer. `ste_micro`: of the
    reference job. `prompt_tokens`: of the job to price; `estimated`: by another model's tokenizer. `ttft_ms` 0: no
    promise, None: not known. `facts`: the offer as the node told it.
    """

    model: str
    seller: str
    unit: str
    prices: basket.Prices | None
    job_prices: basket.Prices | None
    counted: basket.Measured | None
    ste_micro: int | None
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int
    base_bps: int | None
    ttft_ms: int | None
    verifiability: str
    facts: dict[str, Any]
    estimated: bool = False
    too_long: bool = False

    @property
    def per_ste(self) -> int | None:
        """Per standard token equivalent of the reference job."""
        return basket.ste_up(self.prices, self.ste_micro) if self.prices and self.ste_micro else None

    @property
    def per_million(self) -> int | None:
        """Per million tokens of the mix."""
        return basket.tokens_up(self.prices) if self.prices else None

    @property
    def per_megabyte(self) -> int | None:
        """Per megabyte of reference text."""
        return basket.text_up(self.prices, self.counted) if self.prices and self.counted else None

    @property
    def job(self) -> int | None:
        """The one job that was asked about."""
        if self.job_prices is None or self.prompt_tokens is None or self.output_tokens is None or self.too_long:
            return None
        usage = Usage(self.prompt_tokens, min(self.cached_tokens, self.prompt_tokens), self.output_tokens, 0)
        return basket.job_up(self.job_prices, usage)


def offer_row(offer: dict[str, Any], wanted: Wanted) -> Row:
    """An offer of the `market` route, measured. Raises: MalformedBundle when the node's answer is none."""
    tariff = Node("tariff", offer["tariff"]).document(Tariff)
    reference = offer.get("reference")
    counted = wanted.prompt if wanted.prompt is not None else (reference or {}).get("prompt_tokens")
    prompt = counted if wanted.output is not None else None
    length = (prompt or 0) + (wanted.output or 0)
    return Row(
        model=offer["model"],
        seller=offer["provider"],
        unit=TALLY,
        prices=_prices(tariff, wanted.tier, offer["base_bps"], basket.MIX.prompt),
        job_prices=None if prompt is None else _prices(tariff, wanted.tier, offer["base_bps"], prompt),
        counted=basket.measured(tuple(reference["tokens"].values())) if reference else None,
        ste_micro=reference["ste_micro"] if reference else None,
        prompt_tokens=prompt,
        output_tokens=wanted.output,
        cached_tokens=wanted.cached,
        base_bps=offer["base_bps"],
        ttft_ms=tier_terms(tariff, wanted.tier)[1],
        verifiability=offer["verifiability"],
        facts=offer,
        too_long=length > offer["max_context"] or (wanted.output or 0) > offer["max_output"],
    )


def _prices(tariff: Tariff, tier: Tier, base_bps: int, prompt_tokens: int) -> basket.Prices | None:
    try:
        return basket.prices_of(tariff, Basis(tier=tier, base_bps=base_bps), prompt_tokens)
    except (TierNotOffered, FieldOutOfRange):
        return None


def outside_row(sheet: PriceSheet, model: OutsideModel, tally_usd: Decimal | None, wanted: Wanted) -> Row:
    """One model of an imported sheet, in USD, or in TALLY at the configured rate.

    Each price is rounded up to 10^-18 on its own, so that nothing outside looks cheaper than it is.
    """
    if tally_usd is None:
        unit, scale = "USD", Decimal(10) ** 18
        each = [int((price * scale).to_integral_value(ROUND_CEILING)) for price in _usd(model)]
    else:
        wei = wei_prices(model.usd, tally_usd)
        unit, each = TALLY, [wei.prompt, wei.cached, wei.completion, wei.reasoning, wei.request]
    prices = basket.Prices(*each)
    length = (wanted.prompt or 0) + (wanted.output or 0)
    too_long = bool(model.context and length > model.context)
    too_long = too_long or bool(model.max_output and (wanted.output or 0) > model.max_output)
    return Row(
        model=model.id,
        seller=_host(sheet.source),
        unit=unit,
        prices=prices,
        job_prices=prices,
        counted=None,
        ste_micro=None,
        prompt_tokens=wanted.prompt if wanted.output is not None else None,
        output_tokens=wanted.output,
        cached_tokens=wanted.cached,
        base_bps=None,
        ttft_ms=None,
        verifiability="none",
        facts={"outside": True, "source": sheet.source, "imported_at": sheet.read_at, "max_context": model.context},
        too_long=too_long,
    )


def _usd(model: OutsideModel) -> tuple[Decimal, ...]:
    return (model.usd.prompt, model.usd.cached, model.usd.completion, model.usd.reasoning, model.usd.request)


def _host(source: str) -> str:
    """`https://openrouter.ai/api/v1/models` -> `openrouter.ai`; a file by its name."""
    return urlsplit(source).hostname or PurePath(source).name


def lend_counts(rows: Sequence[Row]) -> list[Row]:
    """Outside rows with the token counts of offers, since a sheet names no tokenizer.

    Of an offer of the same model where there is one, else the highest count at hand; marked as estimated either way.
    """
    owned = [row for row in rows if row.counted is not None]
    out = []
    for row in rows:
        same = [other for other in owned if other.model == row.model] or owned
        if row.counted is not None or not same:
            out.append(row)
            continue
        text = max((other.counted for other in same if other.counted), key=lambda counted: counted.total)
        prompts = [other.prompt_tokens for other in same if other.prompt_tokens is not None]
        asked = row.output_tokens is not None and row.prompt_tokens is None
        prompt = max(prompts) if asked and prompts else row.prompt_tokens
        out.append(replace(row, counted=text, prompt_tokens=prompt, estimated=True))
    return out


SORTS: Final = ("ste", "tokens", "text", "ttft", "job")


def sorted_by(rows: Sequence[Row], key: str) -> list[Row]:
    """Cheapest (soonest) first; what is not known, or in another unit, comes after it. A promise of 0 ms is none."""
    figures: dict[str, Callable[[Row], int | None]] = {
        "ste": lambda row: row.per_ste,
        "tokens": lambda row: row.per_million,
        "text": lambda row: row.per_megabyte,
        "ttft": lambda row: row.ttft_ms or None,
        "job": lambda row: row.job,
    }
    figure = figures[key]

    def place(row: Row) -> tuple[bool, bool, int, str, str]:
        found = figure(row)
        foreign = key != "ttft" and row.unit != TALLY
        return (found is None, foreign, found or 0, row.model, row.seller)

    return sorted(rows, key=place)


def as_json(row: Row) -> dict[str, Any]:
    """The row's facts and figures; amounts in 10^-18 of `unit`, as decimal strings."""

    def text(amount: int | None) -> str | None:
        return None if amount is None else str(amount)

    prices = row.prices
    effective = None
    if prices is not None:
        named = ("prompt", "cached", "output", "reasoning")
        effective = {name: str(basket.million_up(getattr(prices, name), prices.multiplier)) for name in named}
    facts = {name: value for name, value in row.facts.items() if name != "tariff"}
    return {
        **facts,
        "model": row.model,
        "seller": row.seller,
        "unit": row.unit,
        "basket": basket.BASKET,
        "per_million": effective,
        "per_ste": text(row.per_ste),
        "per_million_mix": text(row.per_million),
        "per_megabyte": text(row.per_megabyte),
        "job": text(row.job),
        "job_tokens": None if row.prompt_tokens is None else [row.prompt_tokens, row.output_tokens, row.cached_tokens],
        "estimated": row.estimated,
        "ttft_ms": row.ttft_ms,
        "base_bps": row.base_bps,
        "verifiability": row.verifiability,
    }


def factor(bps: int) -> str:
    """`12500` -> `x1.25`."""
    whole, rest = divmod(bps, BPS)
    return f"x{whole}" + (f".{rest:04d}".rstrip("0") if rest else "")
