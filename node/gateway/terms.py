"""On which terms a request buys: tier, price, reservation, privacy, cache. OpenAI's own fields first, `x_tally` beside.

`x_tally` is an object in the body (SDKs: `extra_body={"x_tally": {...}}`) with `max_price` (TALLY, decimal text),
`tier`, `reservation` and `only` (0x-hexadecimal), `private`, `batch`, `dry_run`. A name it does not know is refused: a
mistyped limit would otherwise be no limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from node.config_values import tally
from node.gateway.fields import Fields
from protocol.units import ZERO_DIGEST, Address, Digest, JobKind, Tier, Wei

MAX_ONLY: Final = 64
"""Providers a request may confine itself to. Far above what anybody lists by hand."""

MAX_CACHE_KEY: Final = 256
"""Longest `prompt_cache_key`. Unit: characters. It is hashed; applications send a user's or conversation's id."""

_TIERS: Final = {
    "auto": Tier.STANDARD,
    "default": Tier.STANDARD,
    "standard": Tier.STANDARD,
    "flex": Tier.FLEX,
    "priority": Tier.PRIORITY,
}
_KNOWN: Final = frozenset({"max_price", "tier", "reservation", "only", "private", "batch", "dry_run"})


@dataclass(frozen=True, slots=True)
class Terms:
    """`service_tier`: the tier as it is named in the answer. `max_price`: wei, None for the gateway's own limit.

    `cache_key`: keeps this request's prompt cache apart, "" for the common one. `dry_run`: only say what it may cost.
    """

    tier: Tier
    service_tier: str
    max_price: Wei | None = None
    reservation: Digest = ZERO_DIGEST
    only: frozenset[Address] = frozenset()
    private: bool = False
    batch: bool = False
    dry_run: bool = False
    cache_key: str = ""

    @property
    def kind(self) -> JobKind:
        """The kind of a generation under these terms."""
        return JobKind.BATCH if self.batch else JobKind.GENERATE


def parse_terms(fields: Fields) -> Terms:
    """Raises: ApiError (400)."""
    extra = fields.object("x_tally")
    for name in fields.get("x_tally") or {}:
        if name not in _KNOWN:
            raise extra.fail(str(name)[:40], f"is unknown; x_tally takes {', '.join(sorted(_KNOWN))}")
    where, field = (extra, "tier") if extra.get("tier") is not None else (fields, "service_tier")
    named = where.text(field) or "auto"
    if named not in _TIERS:
        raise where.fail(field, f"must be one of {', '.join(_TIERS)}")
    tier, batch = _TIERS[named], extra.flag("batch")
    if batch and tier is not Tier.FLEX and named != "auto":
        raise where.fail(field, "must be flex, or left out, for a batch job")
    tier = Tier.FLEX if batch else tier
    cache_key = fields.text("prompt_cache_key") or ""
    if len(cache_key) > MAX_CACHE_KEY:
        raise fields.fail("prompt_cache_key", f"must have at most {MAX_CACHE_KEY} characters")
    reservation = extra.text("reservation")
    return Terms(
        tier=tier,
        service_tier="default" if tier is Tier.STANDARD else tier.name.lower(),
        max_price=_price(extra),
        reservation=Digest(_hex(extra, "reservation", reservation, 32)) if reservation else ZERO_DIGEST,
        only=frozenset(
            Address(_hex(extra, f"only[{index}]", item, 20)) for index, item in enumerate(extra.items("only", MAX_ONLY))
        ),
        private=extra.flag("private"),
        batch=batch,
        dry_run=extra.flag("dry_run"),
        cache_key=cache_key,
    )


def _price(extra: Fields) -> Wei | None:
    value = extra.text("max_price")
    if value is None:
        return None
    try:
        return Wei(tally.parse(value))
    except (ValueError, ArithmeticError) as exc:
        raise extra.fail("max_price", f"must be TALLY as decimal text, such as '0.05' ({str(exc)[:80]})") from exc


def _hex(fields: Fields, field: str, value: object, size: int) -> bytes:
    if not isinstance(value, str) or not re.fullmatch(rf"0x[0-9a-fA-F]{{{2 * size}}}", value):
        raise fields.fail(field, f"must be 0x and {2 * size} hexadecimal digits")
    return bytes.fromhex(value[2:])
