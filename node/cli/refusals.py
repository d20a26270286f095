"""What a contract refused, in the units that the commands take: TALLY, STE per second, durations and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from node.cli import money
from node.cli.session import hexed

if TYPE_CHECKING:
    from node.chain.errors import ContractReverted

_Facts = Mapping[str, Any]

_SAID: Final[dict[str, Callable[[_Facts, int], tuple[str, str]]]] = {
    "TermsOutOfRange": lambda f, s: (
        f"terms of {span(f['minPeriods'] * s)} to {span(f['maxPeriods'] * s)} cannot be kept: capacity is sold at most "
        f"{span(f['horizon'] * s)} ahead here",
        "take terms within that with --min-term and --max-term",
    ),
    "TermNotSold": lambda f, s: (
        f"a term of {span(f['periods'] * s)} is not sold: this provider sells {span(f['minPeriods'] * s)} to "
        f"{span(f['maxPeriods'] * s)}",
        "choose a term within that with --for",
    ),
    "OutsideHorizon": lambda f, s: (
        f"{when(f['first'] * s)} to {when(f['last'] * s)} cannot be bought now: what is sold lies between "
        f"{when(f['earliest'] * s)} and {when(f['latest'] * s)}",
        "choose another --start, or a shorter term",
    ),
    "SoldAlready": lambda f, s: (
        f"{rate_text(f['sold'])} STE/s are sold already at {when(f['period'] * s)}, more than "
        f"{rate_text(f['capacity'])}",
        "offer at least that much, or sell no more with --close",
    ),
    "SoldOut": lambda f, s: (
        f"only {rate_text(f['free'])} STE/s are free at {when(f['period'] * s)}, not {rate_text(f['rate'])}",
        "choose a lower rate, another --start or another provider",
    ),
    "CostAbove": lambda f, _: (
        f"it costs {money.amount(f['cost'])} now, above the limit of {money.amount(f['maxCost'])}",
        "allow more with --max-cost, or buy less",
    ),
    "NotHolder": lambda f, _: (
        f"the reservation is held by {_address(f['holder'])}, and this home's wallet is {_address(f['caller'])}",
        "`tally reservation list` shows what this wallet holds",
    ),
    "NotProvider": lambda f, _: (
        f"the reservation was sold by {_address(f['provider'])}, and this home's wallet is {_address(f['caller'])}",
        "`tally reservation list` shows what this wallet sold",
    ),
    "EndsAnyway": lambda f, _: (
        f"the reservation ends at {when(f['end'])} anyway; ended now it would end at {when(f['earliest'])}",
        "",
    ),
    "AlreadyEnlisted": lambda _, __: ("this home's wallet is enlisted already", "`tally validator status` shows it"),
    "NotEnlisted": lambda _, __: ("this home's wallet is not enlisted", "`tally validator enlist` enlists it"),
    "NothingUnbonding": lambda _, __: (
        "none of this wallet's stake is unbonding",
        "`tally validator retire --unbond` begins to take it back",
    ),
    "StillBonded": lambda f, _: (
        f"the stake can be withdrawn from {when(f['releaseAt'])} on",
        "`tally validator withdraw` then takes it back",
    ),
}
"""By the custom error's name in IReservations.sol, ICourt.sol and IRegistry.sol, whose NatSpec has their units:
periods, micro-STE per second, wei, Unix seconds. The second text is what to do about it."""


def plainly(refusal: ContractReverted, period_s: int) -> tuple[str, str] | None:
    """(what happened, what to do), or None for a refusal that has no words here. `period_s`: length of a period, s."""
    said = _SAID.get(refusal.name)
    return None if said is None else said(refusal.arguments, period_s)


def _address(value: object) -> str:
    return hexed(value) if isinstance(value, bytes) else str(value)


def rate_text(micro: int) -> str:
    """Micro-STE per second as STE per second: `2500000` -> `2.5`."""
    return f"{micro // 10**6}.{micro % 10**6:06d}".rstrip("0").rstrip(".")


def when(seconds: int) -> str:
    """Unix seconds, to the minute, which no period is shorter than on a public chain."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%MZ")


def span(seconds: int) -> str:
    """`30720` -> `8h 32m`: the largest two units that are not zero."""
    parts = []
    for letter, size in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{letter}")
    return " ".join(parts) or "0s"
