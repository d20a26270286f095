"""`tally tariff`: price sheets, written, signed, put into the chain's log, and shown for what they come to."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from node.cli.failures import CommandFailed
from node.cli.onchain import confirm, need_wallet, on_chain, yes_option
from node.cli.session import Session, emit, hexed, json_option, pass_session, write_private

if TYPE_CHECKING:
    from node.chain.chain import Web3Chain
    from node.config import NodeConfig
    from node.tariff_sheet import SignedSheet
    from protocol.messages import Tariff
    from protocol.signing import Signer

SIGN_MARGIN_S: Final = 120
"""Added to the epoch's delay when a tariff is signed, or half an epoch where that is more. Unit: s. Time to put it into
the log; what comes later than this is refused by the chain and must be signed again."""

MAX_DAYS: Final = 365
"""Longest life of a tariff. Unit: days. Doubling it binds a provider to its prices twice as long."""

POLL_S: Final = 1.0
"""How often --wait looks at the chain's newest block. Unit: s."""


@click.group()
def tariff() -> None:
    """Price sheets: the same for every payer, signed by the node key, public a full epoch before they hold.

    \b
    tally tariff new -o prices.json --set prices.prompt=0.08 --set tiers.priority.factor=2
    tally tariff sign prices.json -o signed.json --model ./my-model
    tally tariff log signed.json --wait
    tally provider run --model ./my-model --tariff signed.json
    """


@tariff.command()
@click.option("--from", "source", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Start from this sheet, JSON or TOML, whole or in part.")  # fmt: skip
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE",
              help="A value, such as prices.completion=0.3 or tiers.flex.factor=0; repeatable.")  # fmt: skip
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File; standard output if none.")
@pass_session
def new(session: Session, source: Path | None, changes: tuple[str, ...], output: Path | None) -> None:
    """Write a sheet with every field, from the settings, a file and --set, the later the stronger. Signs nothing.

    Prices are TALLY per million tokens, factors and shares plain decimals. A tier that is null is not offered.
    """
    from node.tariff_sheet import (
        TariffSheetError,
        checked,
        oddities,
        read_file,
        read_sheet,
        sheet_json,
        wanted_tariff,
        with_values,
    )
    from protocol.units import ZERO_ADDRESS, ZERO_DIGEST

    config = session.load(provider__tariff_file="")
    made = wanted_tariff(config, ZERO_ADDRESS, ZERO_DIGEST)
    if source is not None:
        made = read_sheet(read_file(source), made)
    values = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise TariffSheetError(key, "has no value", "KEY=VALUE")
        values[key.strip()] = value.strip()
    made = with_values(made, values) if values else checked(made)
    text = json.dumps(sheet_json(made), indent=1) + "\n"
    for sentence in oddities(made):
        click.echo(f"note: {sentence}", err=True)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_private(output, text)
        click.echo(f"wrote {output}; `tally tariff sign {output}` signs it", err=True)


@tariff.command()
@click.argument("sheet", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="File; standard output if none.")
@click.option(
    "--model", type=click.Path(path_type=Path), metavar="DIR", help="Model directory whose profile it is for."
)
@click.option("--profile", metavar="HASH", help="The profile it is for, where the sheet does not name it.")
@click.option("--days", type=click.IntRange(1, MAX_DAYS), default=90, show_default=True, help="Life of the tariff.")
@click.option("--delay", type=click.IntRange(0, MAX_DAYS * 86_400), default=0, help="Seconds later than it must be.")
@json_option
@pass_session
def sign(
    session: Session,
    sheet: Path,
    output: Path | None,
    model: Path | None,
    profile: str | None,
    days: int,
    delay: int,
    as_json: bool,
) -> None:
    """Sign SHEET with this home's node key: next sequence number, in force a full epoch from now at the earliest.

    The number is written into the journal before anything is signed, by the provider that runs in this home if one
    does: two sheets under one number would be a proof against this wallet. Nothing is sent.
    """
    from node.tariff_sheet import read_file, read_sheet, signed_text

    config = need_wallet(session)
    read = read_sheet(read_file(sheet))
    named = _profile(config, read, model, profile)
    signed = on_chain(session, config, lambda chain, me: _sign(session, config, chain, me, named, days, delay))
    text = signed_text(signed)
    if output is not None:
        write_private(output, text)
    if as_json or output is None:
        click.echo(text, nl=False)
    _tell_dates(signed.tariff, err=True)
    click.echo(f"put it into the chain's log before then: tally tariff log {output or 'FILE'}", err=True)


def _profile(config: NodeConfig, read: Tariff, model: Path | None, profile: str | None) -> Tariff:
    """With the profile it is for. Raises: CommandFailed, ModelError, TariffSheetError."""
    from node.tariff_sheet import with_values
    from protocol.units import ZERO_DIGEST

    if profile is not None:
        return with_values(read, {"profile_id": profile})
    if model is not None:
        from node.engine.profile import profile_of
        from protocol.eip712 import hash_struct

        return replace(read, profile_id=hash_struct(profile_of(model, config.provider.dtype)))
    if read.profile_id == ZERO_DIGEST:
        raise CommandFailed(
            "the sheet does not say which profile it is for",
            kept="nothing was signed",
            do="--model DIR works it out from a model directory; --profile takes it as `tally market --json` shows it",
        )
    return read


async def _sign(
    session: Session, config: NodeConfig, chain: Web3Chain, me: Signer, read: Tariff, days: int, delay: int
) -> SignedSheet:
    """Raises: CommandFailed, ChainError, KeystoreError, StoreError, TariffSheetError."""
    from node.app import password_of
    from node.keys import addresses, load
    from node.tariff_sheet import SignedSheet, checked

    if read.provider not in (me.address, b"\0" * 20):
        raise CommandFailed(
            f"the sheet is of wallet {hexed(read.provider)}, this home's is {hexed(me.address)}",
            kept="nothing was signed",
        )
    if "node" not in addresses(config.keys_dir):
        raise CommandFailed(f"there is no node key in {config.keys_dir}", kept="nothing was signed", do="`tally init`")
    head, epoch = await chain.head(), await chain.epoch_seconds()
    earliest = max(int(time.time()), head.timestamp) + epoch + max(SIGN_MARGIN_S, epoch // 2) + delay
    start = read.valid_from or earliest
    dated = replace(read, provider=me.address, valid_from=start, valid_until=read.valid_until or start + days * 86_400)
    checked(dated)
    last = await chain.last_sequence(me.address, dated.profile_id)
    numbered = await _claim(session, config, chain, dated, max(last + 1, read.sequence))
    if read.sequence and numbered.sequence != read.sequence:
        raise CommandFailed(
            f"sequence {read.sequence} is taken, the next free one is {numbered.sequence}",
            kept="nothing was signed",
            do="leave sequence null in the sheet",
        )
    key = await asyncio.to_thread(load, config.keys_dir, "node", password_of(config))
    return SignedSheet(chain.domain, key.address, numbered, key.sign(chain.domain, numbered))


async def _claim(session: Session, config: NodeConfig, chain: Web3Chain, dated: Tariff, least: int) -> Tariff:
    """With a number that was never given, written down. Raises: ControlRefused, StoreError."""
    from node.app import journal
    from node.gateway.control import ControlUnavailable
    from node.provider.sequence import claim
    from protocol.bundle_json import Node, document_json
    from protocol.messages import Tariff

    try:
        answer = await session.control().call("tariff_claim", tariff=document_json(dated), least=least)
        return Node("tariff", answer["tariff"]).document(Tariff)
    except ControlUnavailable:
        pass
    async with journal(config) as store:
        return await claim(store, chain.domain, dated, least)


@tariff.command("log")
@click.argument("signed", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--wait", is_flag=True, help="Return when it is in force.")
@yes_option
@json_option
@pass_session
def log_(session: Session, signed: Path, wait: bool, yes: bool, as_json: bool) -> None:
    """Put a SIGNED tariff into the chain's log; a second one under its sequence number is refused.

    A provider that runs in this home goes over to it by itself when it comes into force.
    """
    from node.tariff_sheet import read_file, read_signed

    config = need_wallet(session)
    read = read_signed(read_file(signed))
    confirm(yes, f"log tariff {read.tariff.sequence} of profile {hexed(read.tariff.profile_id)[:12]}")
    facts = on_chain(session, config, lambda chain, _: _log(session, chain, read, wait))
    if as_json:
        emit(facts)
        return
    if facts["transaction"]:
        click.echo(f"logged in block {facts['block']}: transaction {facts['transaction']}")
    else:
        click.echo("it is in the chain's log already; nothing was sent")
    _tell_dates(read.tariff)
    click.echo(facts["running"] or f"serve under it: tally provider run --tariff {signed}")


async def _log(session: Session, chain: Web3Chain, read: SignedSheet, wait: bool) -> dict[str, Any]:
    """Raises: CommandFailed, ChainError."""
    from protocol.eip712 import digest

    sheet = read.tariff
    if read.domain != chain.domain:
        raise CommandFailed(
            f"the tariff is signed for another deployment: chain {read.domain.chain_id} and escrow "
            f"{hexed(read.domain.verifying_contract)}",
            kept="nothing was sent",
        )
    tariff_hash = digest(chain.domain, sheet)
    facts: dict[str, Any] = {"tariff_hash": hexed(tariff_hash), "sequence": sheet.sequence}
    facts |= {"valid_from": sheet.valid_from, "valid_until": sheet.valid_until, "transaction": None, "block": None}
    if await chain.tariff(tariff_hash) is None:
        await _check_loggable(chain, sheet)
        mined = await chain.log_tariff(sheet, read.signature)
        facts |= {"transaction": hexed(mined.transaction), "block": mined.block}
    facts["running"] = await _adopted(session, sheet)
    while wait and (await chain.head()).timestamp < sheet.valid_from:
        await asyncio.sleep(POLL_S)
    return facts


async def _check_loggable(chain: Web3Chain, sheet: Tariff) -> None:
    """Raises: CommandFailed in place of a transaction that the contract would refuse, ChainError."""
    last = await chain.last_sequence(sheet.provider, sheet.profile_id)
    if sheet.sequence <= last:
        raise CommandFailed(
            f"sequence {last} of this profile is in the chain's log, and {sheet.sequence} is not above it: another "
            "sheet was logged under this number or a later one",
            kept="nothing was sent; the logged tariff stands",
            do="`tally tariff sign` gives the sheet the next number",
        )
    earliest = (await chain.head()).timestamp + await chain.epoch_seconds()
    if sheet.valid_from < earliest:
        raise CommandFailed(
            f"it would come into force at {_date(sheet.valid_from)}; logged now, it may not before {_date(earliest)}",
            kept="nothing was sent",
            do="`tally tariff sign` gives it a new date and number",
        )


async def _adopted(session: Session, sheet: Tariff) -> str:
    """Have the provider that runs in this home serve under it; what to say of that, "" when none runs."""
    from node.gateway.control import ControlRefused, ControlUnavailable
    from protocol.bundle_json import document_json

    with suppress(ControlUnavailable):
        try:
            await session.control().call("tariff_adopt", tariff=document_json(sheet))
        except ControlRefused as exc:
            return f"the node that runs in this home does not take it up: {exc}"
        return "the provider that runs in this home offers it as soon as it is in force"
    return ""


@tariff.command()
@click.argument("what", metavar="FILE|HASH|PROVIDER")
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@json_option
@pass_session
def show(session: Session, what: str, bootstrap: tuple[str, ...], as_json: bool) -> None:
    """Every field of a tariff, and what a million tokens cost in each tier, context, privacy and base multiplier.

    A sheet, signed or not; a tariff's hash, from this home's journal or the market; or a provider's wallet, whose
    current tariff is taken from the market.
    """
    from node.cli.tariff_show import found_tariff, lines, shown_json

    tariffs = found_tariff(session, what, bootstrap)
    if as_json:
        emit([shown_json(item) for item in tariffs])
        return
    click.echo("\n\n".join("\n".join(lines(item)) for item in tariffs))


def _tell_dates(sheet: Tariff, *, err: bool = False) -> None:
    click.echo(
        f"tariff {sheet.sequence} is in force from {_date(sheet.valid_from)} until {_date(sheet.valid_until)}", err=err
    )


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
