"""`tally validator`: stake on looking at others' work, and be paid for what was looked at."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.cli import money
from node.cli.failures import CommandFailed, Interrupted
from node.cli.onchain import confirm, need_wallet, on_chain, tell, yes_option
from node.cli.params import HostPort
from node.cli.session import Session, emit, hexed, json_option, pass_session, write_private

if TYPE_CHECKING:
    from node.app import ValidatorApp
    from node.chain.chain import Web3Chain
    from node.cli.running import Stop
    from node.config import NodeConfig
    from node.ports import Mined
    from protocol.signing import Signer


@click.group()
def validator() -> None:
    """Check inference: replay drawn jobs of others, commit to a verdict, reveal it.

    A beacon nobody knows beforehand draws jobs and validators. Who agrees with the quorum and measured the same is
    credited; who claims what it did not measure loses a part of its stake.

    \b
    tally validator run --model ./Qwen3-0.6B
    tally validator status
    tally case list
    """


@validator.command()
@click.option("--model", "models", multiple=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Hugging Face model directory to replay with; repeatable.")  # fmt: skip
@click.option("--listen", type=HostPort(), metavar="HOST:PORT", help="Where peers reach this node; port 0 takes any.")
@click.option("--bootstrap", multiple=True, metavar="ADDR", help="/ip4/.../p2p/... of a peer to ask first; repeatable.")
@click.option("--stake", metavar="TALLY", help="Stake to hold in the Registry.")
@click.option("--ready-file", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON there when enlisted.")
@json_option
@pass_session
def run(
    session: Session,
    models: tuple[Path, ...],
    listen: tuple[str, int] | None,
    bootstrap: tuple[str, ...],
    stake: str | None,
    ready_file: Path | None,
    as_json: bool,
) -> None:
    """Enlist and judge until Ctrl-C or SIGTERM.

    The model of each profile is loaded when a case first needs it; a case of a profile that is not here is left to
    the others and counts as missed. A stop is safe at any moment: a verdict is in the journal before its digest is
    on chain, and the next start reveals what was journaled.

    \b
    tally validator run --model ./Qwen3-0.6B --model ./OLMoE-1B-7B
    tally validator run --model ./m --bootstrap /ip4/203.0.113.7/tcp/4001/p2p/16Uiu2HAm...
    """
    host, port = listen or (None, None)
    config = session.load(
        validator__model_dirs=models or None,
        validator__stake=stake,
        transport__listen_host=host,
        transport__listen_port=port,
        transport__bootstrap=bootstrap or None,
    )
    session.log(config, serving=True)
    from node.cli.running import Stop
    from node.cli.running import run as run_to_end

    stop = Stop("stopping: verdicts are in the journal, and the next start goes on with them")
    run_to_end(_judge(config, stop, ready_file, as_json), stop)
    if stop.interrupted:
        raise Interrupted(stop.code)


async def _judge(config: NodeConfig, stop: Stop, ready_file: Path | None, as_json: bool) -> None:
    from node.app import validator_app

    async with validator_app(config) as app:
        facts = await ready_facts(app)
        if ready_file is not None:
            write_private(ready_file, json.dumps(facts) + "\n")
        if as_json:
            emit(facts)
        else:
            click.echo("\n".join(_banner(facts, config)))
        await stop.wait()


async def ready_facts(app: ValidatorApp) -> dict[str, Any]:
    """What others need to know of a validator. `addresses` end in /p2p/, as --bootstrap takes them."""
    peer_id = app.transport.peer_id
    return {
        "role": "validator",
        "peer_id": peer_id,
        "addresses": [f"{address}/p2p/{peer_id}" for address in app.transport.addresses],
        "wallet": hexed(app.wallet.address),
        "node_key": hexed(app.node_key.address),
        "models": (await app.validator.status())["models"],
        "pid": os.getpid(),
    }


def _banner(facts: dict[str, Any], config: NodeConfig) -> list[str]:
    return [
        f"judging    {', '.join(facts['models'])}",
        f"peer       {facts['peer_id']}",
        f"wallet     {facts['wallet']}",
        f"node key   {facts['node_key']}",
        f"stake      {money.amount(config.validator.stake)}",
        "Ctrl-C stops cleanly; `tally case list` shows the Court's cases",
    ]


@validator.command()
@json_option
@pass_session
def status(session: Session, as_json: bool) -> None:
    """What the Court knows of this home's wallet: enlisted, stake, tokens credited, reveals missed."""
    facts: dict[str, Any] = on_chain(session, need_wallet(session), _standing)
    if as_json:
        emit(facts)
        return
    stake = int(facts["stake_wei"])
    short = max(0, int(facts["needed_wei"]) - stake)
    click.echo(f"wallet     {facts['wallet']}")
    click.echo(f"enlisted   {'yes' if facts['enlisted'] else 'no: `tally validator enlist`'}")
    click.echo(f"stake      {money.amount(stake)}" + (f"; {money.amount(short)} short" if short else ""))
    if int(facts["unbonding_wei"]):
        click.echo(f"unbonding  {money.amount(int(facts['unbonding_wei']))}; `tally validator withdraw` when it is due")
    click.echo(f"credited   {facts['credited_tokens']} tokens looked at; {facts['reveals_missed']} reveals missed")
    click.echo(f"validators {facts['validators']} enlisted in all")


async def _standing(chain: Web3Chain, me: Signer) -> dict[str, Any]:
    from node.app import court_of

    court = court_of(chain)
    enlisted, stake = await court.validators(), await chain.stake_of(me.address)
    credited, missed = await court.credits(me.address)
    return {
        "wallet": hexed(me.address),
        "enlisted": me.address in enlisted,
        "validators": len(enlisted),
        "stake_wei": str(stake.active),
        "unbonding_wei": str(stake.unbonding),
        "release_at": stake.release_at,
        "needed_wei": str((await court.rules()).validator_stake),
        "credited_tokens": credited,
        "reveals_missed": missed,
    }


@validator.command()
@yes_option
@json_option
@pass_session
def enlist(session: Session, yes: bool, as_json: bool) -> None:
    """Register, stake and be drawn from now on. `tally validator run` does it by itself.

    Who is drawn and does not judge is counted as missed, so enlist where a validator runs.
    """
    config = need_wallet(session)
    confirm(yes, f"stake {money.amount(config.validator.stake)} and be drawn for committees")

    async def act(chain: Web3Chain, _: Signer) -> Mined:
        from node.app import court_of, node_key_of

        court, wanted = court_of(chain), config.validator.stake
        needed = (await court.rules()).validator_stake
        if wanted < needed:
            raise CommandFailed(
                f"validators must hold {money.amount(needed)}, and validator.stake is {money.amount(wanted)}",
                kept="nothing was sent",
                do="raise validator.stake in the settings",
            )
        await chain.register_provider((await node_key_of(config)).secret, wanted)
        return await court.enlist()

    tell(on_chain(session, config, act), as_json)


@validator.command()
@click.option("--unbond", is_flag=True, help="Begin to take the whole stake back as well.")
@yes_option
@json_option
@pass_session
def retire(session: Session, unbond: bool, yes: bool, as_json: bool) -> None:
    """No longer be drawn. Seats already given stay: let the validator run until its cases are over."""
    confirm(yes, "leave the list that committees are drawn from")

    async def act(chain: Web3Chain, me: Signer) -> Mined:
        from node.app import court_of

        mined = await court_of(chain).retire()
        stake = await chain.stake_of(me.address)
        return await chain.request_unbond(stake.active) if unbond and stake.active else mined

    tell(on_chain(session, need_wallet(session), act), as_json)


@validator.command()
@yes_option
@json_option
@pass_session
def withdraw(session: Session, yes: bool, as_json: bool) -> None:
    """Take stake back whose unbonding is over."""
    confirm(yes, "take unbonded stake back to the wallet")
    tell(on_chain(session, need_wallet(session), lambda chain, _: chain.withdraw_stake()), as_json)
