"""`tally provider economics`: what serving brought and cost, for the provider's own eyes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli import money
from node.cli.failures import CommandFailed
from node.cli.session import Session, emit, json_option, pass_session
from node.config_values import PICO, duration
from protocol.units import BPS, WEI_PER_TALLY, Wei

if TYPE_CHECKING:
    from incentives.economics import Activity, Economics, Machine
    from node.config import EconomicsConfig, NodeConfig

ANSWER_S: Final = 60.0
"""How long a running provider gets to look through its journal. Unit: s."""


class Duration(click.ParamType[int]):
    """`90s`, `10m`, `2h`, `7d`; seconds out."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises: BadParameter."""
        if isinstance(value, int):
            return value
        try:
            return int(duration.parse(value))
        except ValueError as exc:
            self.fail(f"{exc}; expected {duration.form}", param, ctx)


@click.command()
@click.option("--since", type=Duration(), default="7d", show_default=True, help="How far back: 90s, 10m, 2h, 7d.")
@json_option
@pass_session
def economics(session: Session, since: int, as_json: bool) -> None:
    """Revenue, energy, depreciation, utilisation, hit rate and break-even price of this provider.

    From its own journal and the settings economics.* (power, price of a kilowatt hour, hardware price and lifetime,
    worth of one TALLY). Nothing of it is in any offer or receipt, and only the owner of this home can ask for it.
    Costs and prices are rounded up to six digits; --json has them whole.

    \b
    tally provider economics --since 30d
    tally provider economics --json
    """
    from incentives.economics import Machine
    from incentives.economics import economics as worked_out
    from node.cli.running import run

    config = session.load()
    session.log(config, serving=False)
    own = config.economics
    now_ms = time.time_ns() // 1_000_000
    activity, whole = run(_activity(session, config, now_ms - since * 1000, now_ms))
    machine = Machine(
        own.watts_idle, own.watts_busy, own.price_per_kwh, own.hardware_price, own.lifetime, own.tally_rate
    )
    found = worked_out(machine, activity)
    if as_json:
        emit(_json(own, activity, found, whole))
    else:
        click.echo("\n".join(_lines(own, machine, activity, found, whole)))


async def _activity(session: Session, config: NodeConfig, since_ms: int, until_ms: int) -> tuple[Activity, bool]:
    """Raises: CommandFailed, ControlRefused, StoreError."""
    from incentives.economics import Activity
    from node.app import journal
    from node.books import books_routes
    from node.gateway.control import ControlUnavailable

    params = {"since_ms": since_ms, "until_ms": until_ms, "slots": config.provider.slots}
    try:
        answer = await session.control().call("activity", timeout_s=ANSWER_S, **params)
    except ControlUnavailable:
        if not config.journal.exists():
            raise CommandFailed(
                f"there is no journal in {config.home}: nothing was sold from here yet",
                do="`tally provider run` starts one; --home names another home",
            ) from None
        async with journal(config) as store:
            answer = await books_routes(store)["activity"](params)
    values: dict[str, Any] = {name: int(text) for name, text in answer["activity"].items()}
    return Activity(**values), bool(answer["whole"])


def _json(own: EconomicsConfig, activity: Activity, found: Economics, whole: bool) -> dict[str, Any]:
    amounts = ("energy", "depreciation", "cost", "energy_per_ste", "depreciation_per_ste", "profit")
    shares = ("busy_bps", "slots_bps", "cached_bps", "fee_bps", "price_bps")
    wei = ("revenue_per_ste_wei", "break_even_wei")
    return {
        "currency": own.currency,
        "currency_decimals": len(str(PICO)) - 1,
        "whole": whole,
        "period_ms": activity.period_ms,
        "busy_ms": activity.busy_ms,
        "jobs": activity.jobs,
        "prompt_tokens": activity.prompt_tokens,
        "cached_tokens": activity.cached_tokens,
        "completion_tokens": activity.completion_tokens,
        "ste_micro": activity.ste_micro,
        "revenue_wei": str(activity.revenue),
        "settled_wei": str(activity.settled),
        "fee_wei": str(activity.fee),
        "gas_coin_wei": str(activity.gas_wei),
        **{name: _text(getattr(found, name)) for name in (*amounts, *wei)},
        **{name: getattr(found, name) for name in shares},
    }


def _text(amount: int | None) -> str | None:
    return None if amount is None else str(amount)


def _lines(own: EconomicsConfig, machine: Machine, activity: Activity, found: Economics, whole: bool) -> list[str]:
    def paid(amount: int | None) -> str:
        return "not known" if amount is None else f"{_readable(amount)} {own.currency}"

    def each(amount: int | None) -> str:
        return "" if amount is None else f", {paid(amount)} an STE"

    seconds = activity.period_ms // 1000
    lines = [
        f"period        {seconds // 3600} h {seconds % 3600 // 60:02} min"
        + ("" if whole else "; older jobs than the newest 100,000 were not looked at"),
        f"jobs          {activity.jobs}",
        f"tokens        {activity.prompt_tokens} prompt ({_percent(found.cached_bps)} cache hits), "
        f"{activity.completion_tokens} output",
        f"work          {_decimal(activity.ste_micro * (PICO // 10**6))} STE",
        f"busy          {_percent(found.busy_bps)} of the time, {_percent(found.slots_bps)} of the slots",
        f"revenue       {money.amount(activity.revenue)}, {_per_ste(found.revenue_per_ste_wei)}",
        f"energy        {paid(found.energy)}{each(found.energy_per_ste)}",
        f"depreciation  {paid(found.depreciation)}{each(found.depreciation_per_ste)}",
        f"cost          {paid(found.cost)}",
        f"protocol fee  {_percent(found.fee_bps)} of what was settled so far; "
        f"gas {money.tally(activity.gas_wei)} of the chain's coin in all",
    ]
    if not machine.tally_rate:
        return [*lines, "break-even    set economics.tally_rate (what one TALLY is worth) to compare revenue and cost"]
    lines.append(f"break-even    {_per_ste(found.break_even_wei)}" + (", fee included" if found.break_even_wei else ""))
    if found.price_bps is not None:
        lines.append(f"              that is {_percent(found.price_bps)} of the price obtained")
    return [
        *lines,
        f"profit        {paid(found.profit)} after fee, at {_decimal(machine.tally_rate)} {own.currency} a TALLY",
    ]


def _per_ste(wei: Wei | None) -> str:
    return "no work yet" if wei is None else f"{money.rounded_up(wei)} TALLY an STE"


def _readable(pico: int) -> str:
    """10^-12 units to six significant digits, away from zero; --json has them whole."""
    shown = money.rounded_up(abs(pico) * (WEI_PER_TALLY // PICO))
    return f"-{shown}" if pico < 0 else shown


def _decimal(pico: int) -> str:
    """10^-12 units as an exact decimal."""
    return money.tally(pico * (WEI_PER_TALLY // PICO))


def _percent(bps: int) -> str:
    return f"{bps * 100 // BPS}.{bps % 100:02d} %"
