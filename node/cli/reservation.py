"""`tally reservation`: capacity sold ahead, on chain: STE per second of a provider's model for a term, transferable."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from node.cli import money
from node.cli.failures import CommandFailed
from node.cli.onchain import confirm, need_wallet, on_chain, run_quietly, session_key, tell, transact, yes_option
from node.cli.params import Amount, WalletAddress
from node.cli.refusals import rate_text, when
from node.cli.session import Session, emit, hexed, json_option, pass_session
from node.cli.tables import short, table
from node.config_values import duration, price
from protocol.units import ZERO_ADDRESS, Address, Digest, Wei

if TYPE_CHECKING:
    from node.chain.chain import Web3Chain
    from node.config import NodeConfig
    from node.config_values import Kind
    from node.ports import Mined, ReservationRecord
    from protocol.signing import Signer

_MICRO_DIGITS = 6


class Rate(click.ParamType[int]):
    """STE per second as a decimal, `2.5`; micro-STE per second out, never rounded."""

    name = "ste/s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises: BadParameter, also for zero."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,12})(?:\.([0-9]{1,6}))?", str(value))
        micro = int(match[1] + (match[2] or "").ljust(_MICRO_DIGITS, "0")) if match else 0
        if not 0 < micro < 1 << 64:
            self.fail(f"{value!r} is no rate; expected STE per second such as 2.5, with at most 6 decimals", param, ctx)
        return micro


class Setting(click.ParamType[int]):
    """A value written as in the settings file."""

    def __init__(self, name: str, kind: Kind) -> None:
        self.name, self._kind = name, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises: BadParameter."""
        if isinstance(value, int):
            return value
        try:
            return int(self._kind.parse(value))
        except (ValueError, ArithmeticError) as exc:
            self.fail(f"{exc}; expected {self._kind.form}", param, ctx)


class Moment(click.ParamType[int]):
    """A time as ISO 8601, UTC unless it says otherwise; Unix seconds out."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises: BadParameter."""
        if isinstance(value, int):
            return value
        try:
            read = datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is no time; expected one such as 2027-01-31T08:00", param, ctx)
        return int((read if read.tzinfo else read.replace(tzinfo=UTC)).timestamp())


@click.group()
def reservation() -> None:
    """Capacity bought ahead: a provider's compute at a rate for a term, however busy it is then.

    A rate is in STE per second: a standard token equivalent is the work of one token through an 8-billion-parameter
    model. Jobs under a reservation are paid as ever, at the tariff's reserved price and without the congestion factor.
    """


_id_argument = click.argument("reservation_id", metavar="ID")


# --------------------------------------------------------------------------------------------------------------- buying


@reservation.command()
@click.argument("model")
@click.argument("rate", type=Rate())
@click.option("--for", "term", type=Setting("duration", duration), required=True, help="How long, such as 12h or 7d.")
@click.option(
    "--from", "provider", type=WalletAddress(), help="Wallet of the provider; needed when several offer MODEL."
)
@click.option("--start", type=Moment(), help="When it begins. [default: with the next period]")
@click.option("--session", "client", type=WalletAddress(), help="Session key that may use it. [default: this home's]")
@click.option("--max-cost", type=Amount(), help="Most TALLY to pay. [default: what it costs now]")
@yes_option
@json_option
@pass_session
def buy(
    session: Session,
    model: str,
    rate: int,
    term: int,
    provider: Address | None,
    start: int | None,
    client: Address | None,
    max_cost: Wei | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Reserve RATE (STE per second) of MODEL, a name on the market or a profile id.

    Capacity is sold in whole periods; a term is rounded up to them. The price is escrowed and becomes the provider's as
    time passes.

    \b
    tally reservation buy Qwen3-0.6B 2.5 --for 7d
    tally reservation buy 0x5f..(64 digits) 0.5 --for 12h --from 0x52908400098527886E0F7030069857D2E4169EE7
    """
    config = need_wallet(session)
    seller, profile_id = run_quietly(session, config, _seller(session, config, model, provider))

    async def act(chain: Web3Chain, _: Signer) -> tuple[Digest, Mined]:
        from incentives.reservation import per_period_up
        from node.ports import ReservationOrder

        terms = await chain.capacity(seller, profile_id)
        if terms is None or not terms.max_periods:
            raise CommandFailed(f"provider {hexed(seller)} sells no capacity of {model} ahead", kept="nothing was sent")
        length = await chain.period_seconds()
        now = (await chain.head()).timestamp
        first = now // length + 1 if start is None else start // length
        periods = -(-((start or 0) % length + term) // length)
        cost = Wei(per_period_up(rate, length, terms.price) * periods)
        said = f"reserve {rate_text(rate)} STE/s from {when(first * length)} to {when((first + periods) * length)}"
        confirm(yes, f"{said} for {money.amount(cost)}, with {hexed(seller)}")
        user = client or (await session_key(config)).address
        limit = cost if max_cost is None else max_cost
        return await chain.buy_reservation(ReservationOrder(seller, profile_id, rate, first, periods, user, limit))

    right, mined = on_chain(session, config, act)
    tell(mined, as_json, reservation=hexed(right))


async def _seller(session: Session, config: NodeConfig, model: str, provider: Address | None) -> tuple[Address, Digest]:
    """Who sells the model, and as which profile. Raises: CommandFailed, UsageError."""
    if re.fullmatch(r"0x[0-9a-fA-F]{64}", model):
        if provider is None:
            raise click.UsageError("a profile id does not say who sells it: name the provider with --from")
        return provider, Digest(bytes.fromhex(model[2:]))
    offers = await _offers(session, config, model)
    found = sorted({(offer["provider"], offer["profile"]) for offer in offers})
    if provider is not None:
        found = [pair for pair in found if pair[0] == hexed(provider)]
    if not found:
        raise CommandFailed(
            f"no such provider offers {model} now", kept="nothing was sent", do="`tally market` shows what is on offer"
        )
    if len({seller for seller, _ in found}) > 1:
        raise click.UsageError(f"several offer {model}; choose with --from: {', '.join(seller for seller, _ in found)}")
    seller, profile_id = (bytes.fromhex(part.removeprefix("0x")) for part in found[0])
    return Address(seller), Digest(profile_id)


async def _offers(session: Session, config: NodeConfig, model: str) -> list[dict[str, Any]]:
    """Live offers of a model: the running gateway's, else what the bootstrap peers say."""
    from node.gateway.control import ControlUnavailable

    try:
        return list((await session.control().call("market", model=model))["offers"])
    except ControlUnavailable:
        pass
    from node.app import client_app
    from node.routes import market_routes

    async with client_app(config) as app:
        await app.directory.refresh()
        return list((await market_routes(app.marketplace, app.chain)["market"]({"model": model}))["offers"])


# -------------------------------------------------------------------------------------------------------------- looking


@reservation.command("list")
@json_option
@pass_session
def list_(session: Session, as_json: bool) -> None:
    """Reservations that this home's wallet holds or sold."""
    config = need_wallet(session)

    async def act(chain: Web3Chain, me: Signer) -> list[dict[str, Any]]:
        length, now = await chain.period_seconds(), (await chain.head()).timestamp
        return [_facts(record, me.address, length, now) for record in await chain.reservations(me.address)]

    rows = on_chain(session, config, act)
    if as_json:
        emit(rows)
    else:
        head = ("RESERVATION", "SIDE", "PROVIDER", ">STE/S", "FROM", "TO", "STATE", ">PRICE", "SESSION")
        click.echo(table(head, [_row(row) for row in rows]) if rows else "no reservation is held or was sold")


@reservation.command()
@_id_argument
@json_option
@pass_session
def show(session: Session, reservation_id: str, as_json: bool) -> None:
    """One reservation: whose, from when to when, and what of its price is earned."""
    config = need_wallet(session)

    async def act(chain: Web3Chain, me: Signer) -> dict[str, Any]:
        record = await _find(chain, me.address, reservation_id)
        return _facts(record, me.address, await chain.period_seconds(), (await chain.head()).timestamp)

    facts = on_chain(session, config, act)
    if as_json:
        emit(facts)
        return
    for name in ("reservation", "provider", "profile", "holder", "session"):
        click.echo(f"{name:<12}{facts[name] or 'nobody'}")
    click.echo(f"rate        {rate_text(facts['rate_micro'])} STE/s")
    click.echo(f"term        {when(facts['start'])} to {when(facts['end'])} ({facts['state']})")
    click.echo(
        f"price       {money.amount(int(facts['price_wei']))}, of which earned {money.amount(int(facts['earned_wei']))}"
    )
    click.echo(f"notice      {facts['notice_s']} s")


def _facts(record: ReservationRecord, me: Address, length: int, now: int) -> dict[str, Any]:
    from incentives.reservation import earned_down

    passed = max(0, min(now, record.end) - record.start)
    running = "running" if now < record.end else "over"
    return {
        "reservation": hexed(record.id),
        "side": "holder" if record.holder == me else "provider" if record.provider == me else "none",
        "provider": hexed(record.provider),
        "profile": hexed(record.profile_id),
        "holder": hexed(record.holder),
        "session": None if record.session == ZERO_ADDRESS else hexed(record.session),
        "rate_micro": record.rate,
        "start": record.start,
        "end": record.end,
        "state": "to come" if now < record.start else running,
        "notice_s": record.notice * length,
        "price_wei": str(earned_down(record.per_period, record.end - record.start, length)),
        "earned_wei": str(earned_down(record.per_period, passed, length)),
        "claimed_wei": str(record.claimed),
    }


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    return (
        facts["reservation"][:18],
        facts["side"],
        short(facts["provider"]),
        rate_text(facts["rate_micro"]),
        when(facts["start"]),
        when(facts["end"]),
        facts["state"],
        money.tally(int(facts["price_wei"])),
        short(facts["session"] or "-"),
    )


async def _find(chain: Web3Chain, me: Address, text: str) -> ReservationRecord:
    """A reservation by its id, or one of this wallet's by the id's first digits. Raises: CommandFailed."""
    digits = text.removeprefix("0x").lower()
    if not re.fullmatch(r"[0-9a-f]{4,64}", digits):
        raise CommandFailed(f"{text!r} is no reservation's id", kept="nothing was sent", do="`tally reservation list`")
    if len(digits) == 64:
        record = await chain.reservation(Digest(bytes.fromhex(digits)))
        found = [record] if record is not None else []
    else:
        found = [record for record in await chain.reservations(me) if record.id.hex().startswith(digits)]
    if len(found) != 1:
        said = "no reservation's id begins" if not found else f"{len(found)} reservations' ids begin"
        raise CommandFailed(f"{said} with {text}", kept="nothing was sent", do="`tally reservation list` shows yours")
    return found[0]


def whole_id(session: Session, text: str) -> str:
    """A reservation's id as it is, or that of this wallet's one that begins so. Raises: CommandFailed, ChainError."""
    if re.fullmatch(r"0x[0-9a-fA-F]{64}", text):
        return text

    async def act(chain: Web3Chain, me: Signer) -> str:
        return hexed((await _find(chain, me.address, text)).id)

    return on_chain(session, need_wallet(session), act)


# --------------------------------------------------------------------------------------------------- what a holder does


@reservation.command()
@_id_argument
@click.argument("to", type=WalletAddress())
@yes_option
@json_option
@pass_session
def transfer(session: Session, reservation_id: str, to: Address, yes: bool, as_json: bool) -> None:
    """Give a reservation to the wallet TO, which then assigns it to a session key of its own."""
    config = need_wallet(session)
    confirm(yes, f"give reservation {reservation_id} to {hexed(to)}")

    async def act(chain: Web3Chain, me: Signer) -> Mined:
        return await chain.transfer_reservation((await _find(chain, me.address, reservation_id)).id, to)

    transact(session, config, act, as_json)


@reservation.command()
@_id_argument
@click.argument("client", type=WalletAddress(), required=False)
@json_option
@pass_session
def assign(session: Session, reservation_id: str, client: Address | None, as_json: bool) -> None:
    """Let jobs of the session key CLIENT (default: this home's) use a reservation."""
    config = need_wallet(session)

    async def act(chain: Web3Chain, me: Signer) -> Mined:
        user = client or (await session_key(config)).address
        return await chain.assign_reservation((await _find(chain, me.address, reservation_id)).id, user)

    transact(session, config, act, as_json)


@reservation.command("quit")
@_id_argument
@yes_option
@json_option
@pass_session
def quit_(session: Session, reservation_id: str, yes: bool, as_json: bool) -> None:
    """End a reservation after its notice, and take back what the rest cost."""
    config = need_wallet(session)
    confirm(yes, f"end reservation {reservation_id} after its notice")

    async def act(chain: Web3Chain, me: Signer) -> Mined:
        return await chain.quit_reservation((await _find(chain, me.address, reservation_id)).id)

    transact(session, config, act, as_json)


# ------------------------------------------------------------------------------------------------- what a provider does


@reservation.command()
@click.argument("capacity", type=Rate())
@click.option("--price", "per_ste", type=Setting("tally", price), required=True, help="TALLY per million STE.")
@click.option("--profile", "profile_text", metavar="0x…", help="Profile id. [default: what the provider here serves]")
@click.option("--min-term", type=Setting("duration", duration), default="1h", show_default=True, help="Shortest term.")
@click.option("--max-term", type=Setting("duration", duration), help="Longest term. [default: as far as can be sold]")
@click.option("--close", is_flag=True, help="Sell no more; what was sold stays sold.")
@yes_option
@json_option
@pass_session
def offer(
    session: Session,
    capacity: int,
    per_ste: int,
    profile_text: str | None,
    min_term: int,
    max_term: int | None,
    close: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Sell up to CAPACITY (STE per second) of what this provider serves, ahead.

    The shortest term is also the notice with which a holder may quit. What was sold keeps its own terms.

    \b
    tally reservation offer 5 --price 0.2 --min-term 1h --max-term 30d
    """
    config = need_wallet(session)
    profile_id = run_quietly(session, config, _own_profile(session, profile_text))
    confirm(yes, f"sell up to {rate_text(capacity)} STE/s at {money.per_million(per_ste)} TALLY per million STE")

    async def act(chain: Web3Chain, _: Signer) -> Mined:
        from incentives.reservation import HORIZON
        from node.ports import CapacityTerms

        length = await chain.period_seconds()
        least = -(-min_term // length)
        most = HORIZON if max_term is None else max(least, max_term // length)
        most = 0 if close else most
        return await chain.offer_capacity(profile_id, CapacityTerms(capacity, Wei(per_ste), least, most))

    transact(session, config, act, as_json)


async def _own_profile(session: Session, text: str | None) -> Digest:
    """The profile named, or the one that the provider of this home serves. Raises: CommandFailed, UsageError."""
    from node.gateway.control import ControlUnavailable

    if text is None:
        try:
            text = str((await session.control().call("status")).get("profile", ""))
        except ControlUnavailable:
            text = ""
        if not text:
            raise CommandFailed(
                "no provider runs in this home", kept="nothing was sent", do="name the profile with --profile 0x..."
            )
    if not re.fullmatch(r"0x[0-9a-fA-F]{64}", text):
        raise click.UsageError(f"{text!r} is no profile id; expected 0x and 64 hexadecimal digits")
    return Digest(bytes.fromhex(text[2:]))


@reservation.command()
@_id_argument
@yes_option
@json_option
@pass_session
def release(session: Session, reservation_id: str, yes: bool, as_json: bool) -> None:
    """As its provider, end a reservation now; what is unearned goes back to its holder at once."""
    config = need_wallet(session)
    confirm(yes, f"end reservation {reservation_id} now and return the rest of its price")

    async def act(chain: Web3Chain, me: Signer) -> Mined:
        return await chain.release_reservation((await _find(chain, me.address, reservation_id)).id)

    transact(session, config, act, as_json)


@reservation.command()
@json_option
@pass_session
def claim(session: Session, as_json: bool) -> None:
    """Collect what this provider's reservations have earned by now, less the protocol's fee."""
    config = need_wallet(session)

    async def act(chain: Web3Chain, me: Signer) -> Mined:
        length, now = await chain.period_seconds(), (await chain.head()).timestamp
        sold = [record for record in await chain.reservations(me.address) if record.provider == me.address]
        facts = {record.id: _facts(record, me.address, length, now) for record in sold}
        due = {right: int(f["earned_wei"]) - int(f["claimed_wei"]) for right, f in facts.items()}
        rights = [right for right, wei in due.items() if wei > 0]
        if not rights:
            raise CommandFailed("no reservation has earned anything that was not claimed", kept="nothing was sent")
        click.echo(f"claiming {money.amount(sum(due.values()))} before the fee", err=True)
        return await chain.claim_reservation(me.address, rights)

    transact(session, config, act, as_json)
