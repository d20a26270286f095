"""`tally wallet`: the key that holds TALLY, its balance, its escrow channels, and moving money in and out of them."""

from __future__ import annotations

import json
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli import money
from node.cli.failures import CommandFailed
from node.cli.onchain import confirm, need_wallet, run_quietly, session_key, transact, yes_option
from node.cli.params import Amount, WalletAddress
from node.cli.session import Session, emit, hexed, json_option, pass_session
from node.cli.tables import short, table
from node.foreign import tame_py_ecc
from protocol.units import Address, Wei

if TYPE_CHECKING:
    from node.chain.chain import Web3Chain
    from node.config import NodeConfig
    from node.ports import Mined
    from protocol.signing import Signer


@click.group()
def wallet() -> None:
    """The wallet of this home: balance, escrow channels, transfers. Amounts are TALLY.

    The secret stays in keys/wallet.json, encrypted with the password file's password: copy both to a safe place.
    """


@wallet.command()
@json_option
@pass_session
def show(session: Session, as_json: bool) -> None:
    """Address, balance, stake, earnings, and the escrow channels the journal knows."""
    config = need_wallet(session)
    facts = run_quietly(session, config, _facts(session, config))
    if as_json:
        emit(facts)
        return
    click.echo(f"wallet     {facts['wallet']}")
    if facts["error"]:
        click.echo(f"balance    not known now: {facts['error']}")
    else:
        click.echo(f"balance    {money.amount(int(facts['balance_wei']))}")
        click.echo(f"for gas    {money.tally(int(facts['coin_wei']))} of the chain's coin")
        click.echo(f"staked     {money.amount(int(facts['stake_wei']))}")
        click.echo(f"earned     {money.amount(int(facts['earned_wei']))}, settled and not yet collected")
    if facts["channels"]:
        head = ("SIDE", "PROVIDER", "CLIENT", ">DEPOSIT", ">PROMISED", ">CLAIMED", "EXIT")
        click.echo(table(head, [_channel(channel) for channel in facts["channels"]]))


def _channel(channel: dict[str, Any]) -> tuple[str, ...]:
    amounts = (money.tally(int(channel[f"{name}_wei"])) for name in ("deposit", "vouched", "claimed"))
    leaving = datetime.fromtimestamp(channel["exit_at"], UTC).strftime("%m-%d %H:%MZ") if channel["exit_at"] else "-"
    return (channel["role"], short(channel["provider"]), short(channel["client"]), *amounts, leaving)


async def _facts(session: Session, config: NodeConfig) -> dict[str, Any]:
    from node.app import wallet_chain
    from node.cli.ask import ask
    from node.keys import addresses
    from node.ports import ChainError

    me = addresses(config.keys_dir)["wallet"]
    facts: dict[str, Any] = {"wallet": hexed(me), "error": None}
    try:
        async with wallet_chain(config) as (chain, _):
            record = await chain.provider(me)
            facts["balance_wei"] = str(await chain.token_balance(me))
            facts["coin_wei"] = str(await chain.coin_balance(me))
            facts["earned_wei"] = str(await chain.earned(me))
            facts["stake_wei"] = str(record.stake if record is not None else 0)
    except ChainError as exc:
        facts["error"] = str(exc)
    try:
        facts["channels"] = (await ask(session, config, "channels"))["channels"]
    except CommandFailed:
        facts["channels"] = []
    return facts


# ----------------------------------------------------------------------------------------------------------------- keys


@wallet.command()
@json_option
@pass_session
def create(session: Session, as_json: bool) -> None:
    """Make a new wallet key; an existing one is never overwritten."""
    _save(session, secrets.token_bytes(32), as_json)


@wallet.command("import")
@click.argument("file", type=click.Path(allow_dash=True, path_type=Path))
@click.option(
    "--file-password",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File with the password of a keystore that has another one than this home.",
)
@json_option
@pass_session
def import_(session: Session, file: Path, file_password: Path | None, as_json: bool) -> None:
    """Take over an existing key from FILE (- for standard input).

    FILE holds a V3 keystore, or a private key as 64 hexadecimal digits. A key is never taken from the command line,
    where other users and the shell's history would see it.
    """
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise CommandFailed(f"{file} cannot be read: {exc}", kept="no key was changed") from exc
    _save(session, _secret(session, text.strip(), file_password), as_json)


def _secret(session: Session, text: str, file_password: Path | None) -> bytes:
    """The secret in a keystore or in hexadecimal. Raises: CommandFailed, which never shows what was given."""
    if not text.startswith("{"):
        try:
            return bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            raise CommandFailed(
                "that is neither a V3 keystore nor 64 hexadecimal digits", kept="no key was changed"
            ) from None
    tame_py_ecc()
    from eth_account import Account  # slow to import

    from node.app import password_of
    from node.keys import read_password

    password = read_password(file_password) if file_password else password_of(session.load())
    try:
        return bytes(Account.decrypt(json.loads(text), password))
    except (ValueError, KeyError, TypeError) as exc:
        raise CommandFailed(
            f"the keystore does not open: {exc}", kept="no key was changed", do="give its password with --file-password"
        ) from exc


def _save(session: Session, secret: bytes, as_json: bool) -> None:
    from node.app import password_of
    from node.keys import key_path, save

    config = session.load()
    try:
        signer = save(config.keys_dir, "wallet", password_of(config), secret)
    except FileExistsError:
        raise CommandFailed(
            f"there is a wallet already: {key_path(config.keys_dir, 'wallet')}",
            kept="it was not touched",
            do="use another --home for another wallet",
        ) from None
    if as_json:
        emit({"wallet": hexed(signer.address)})
    else:
        click.echo(hexed(signer.address))
        click.echo(f"Copy {config.keys_dir} and the password file to a safe place: nobody can restore them.", err=True)


# ---------------------------------------------------------------------------------------------------------------- money


@wallet.command()
@click.argument("provider", type=WalletAddress())
@click.argument("amount", type=Amount())
@yes_option
@json_option
@pass_session
def deposit(session: Session, provider: Address, amount: Wei, yes: bool, as_json: bool) -> None:
    """Put AMOUNT into the escrow channel with PROVIDER, opening it if needed.

    Not needed in everyday use: a channel is opened and topped up by itself, `client.deposit` at a time.
    """
    config = need_wallet(session)
    confirm(yes, f"put {money.amount(amount)} into escrow with {hexed(provider)}")

    async def act(chain: Web3Chain, _: Signer) -> Mined:
        return await chain.open_channel(provider, (await session_key(config)).secret, amount)

    transact(session, config, act, as_json)


@wallet.command()
@click.argument("provider", type=WalletAddress())
@yes_option
@json_option
@pass_session
def withdraw(session: Session, provider: Address, yes: bool, as_json: bool) -> None:
    """Take what is left in the escrow channel with PROVIDER back, in two steps.

    The first call asks for the exit; the provider then has time to claim what it is owed. The same command after that
    time pays the rest out to the wallet. Called in between it says how long to wait.
    """
    from incentives.ledger import ChannelKey

    config = need_wallet(session)
    confirm(yes, f"take back what is left in the channel with {hexed(provider)}")

    async def act(chain: Web3Chain, _: Signer) -> Mined:
        key = ChannelKey(provider, (await session_key(config)).address)
        slot = await chain.slot(key)
        if slot is None or slot.deposit == slot.claimed:
            raise CommandFailed(f"no escrow is left with {hexed(provider)}", kept="nothing was sent")
        left = money.amount(slot.deposit - slot.claimed)
        if slot.exit_at == 0:
            mined = await chain.request_exit(key)
            click.echo(
                f"asked for the exit of {left}; run the same command again once the exit delay is over", err=True
            )
            return mined
        wait = slot.exit_at - (await chain.head()).timestamp
        if wait > 0:
            raise CommandFailed(
                f"the exit of {left} is asked for and can be taken in {wait} s",
                kept="the escrow stays yours; the provider may claim only what was vouched",
                do="run the same command then",
            )
        return await chain.exit(key)

    transact(session, config, act, as_json)


@wallet.command()
@json_option
@pass_session
def collect(session: Session, as_json: bool) -> None:
    """Bring a provider's settled earnings from the Escrow contract into the wallet."""
    config = need_wallet(session)

    async def act(chain: Web3Chain, me: Signer) -> Mined:
        earned = await chain.earned(me.address)
        if earned == 0:
            raise CommandFailed("nothing is settled that was not collected", kept="nothing was sent")
        click.echo(f"collecting {money.amount(earned)}", err=True)
        return await chain.collect(me.address)

    transact(session, config, act, as_json)


@wallet.command()
@click.argument("to", type=WalletAddress())
@click.argument("amount", type=Amount())
@yes_option
@json_option
@pass_session
def send(session: Session, to: Address, amount: Wei, yes: bool, as_json: bool) -> None:
    """Send AMOUNT of TALLY to the address TO.

    \b
    tally wallet send 0x52908400098527886E0F7030069857D2E4169EE7 2.5
    """
    config = need_wallet(session)
    confirm(yes, f"send {money.amount(amount)} to {hexed(to)}")

    async def act(chain: Web3Chain, _: Signer) -> Mined:
        return await chain.transfer(to, amount)

    transact(session, config, act, as_json)
