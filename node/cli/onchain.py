"""What commands that send transactions share: a wallet to send from, a yes, and what came of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from node.cli.failures import CommandFailed
from node.cli.session import Session, emit, hexed

if TYPE_CHECKING:
    from node.chain.chain import Web3Chain
    from node.config import NodeConfig
    from node.ports import Mined
    from protocol.signing import Signer

T = TypeVar("T")

yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def need_wallet(session: Session) -> NodeConfig:
    """The settings of a home that has a wallet. Raises: CommandFailed, ConfigError."""
    from node.keys import key_path

    config = session.load()
    if not key_path(config.keys_dir, "wallet").exists():
        raise CommandFailed(
            f"there is no wallet in {config.home}",
            kept="nothing was made",
            do="`tally init` makes a home with one; `tally wallet create` or `import` makes only the wallet",
        )
    return config


def confirm(yes: bool, what: str) -> None:
    """Raises: Abort when the answer is no."""
    if not yes:
        click.confirm(f"{what[0].upper()}{what[1:]}?", abort=True, err=True)


async def session_key(config: NodeConfig) -> Signer:
    """This home's session key, made when there is none. Raises: KeystoreError."""
    import asyncio

    from node.app import password_of
    from node.keys import load_or_create

    return await asyncio.to_thread(load_or_create, config.keys_dir, "session", password_of(config))


def on_chain(session: Session, config: NodeConfig, act: Callable[[Web3Chain, Signer], Awaitable[T]]) -> T:
    """Run `act` with the chain and this home's wallet. Raises: KeystoreError, ChainError, and what `act` raises."""

    async def work() -> T:
        from node.app import wallet_chain
        from node.chain.errors import ContractReverted
        from node.cli.refusals import plainly

        async with wallet_chain(config) as (chain, me):
            try:
                return await act(chain, me)
            except ContractReverted as exc:
                said = plainly(exc, await chain.period_seconds())
                if said is None:
                    raise
                raise CommandFailed(said[0], kept="nothing was moved", do=said[1]) from exc

    done: T = run_quietly(session, config, work())
    return done


def transact(
    session: Session, config: NodeConfig, act: Callable[[Web3Chain, Signer], Awaitable[Mined]], as_json: bool
) -> None:
    """Run an `act` that is one transaction, and say what came of it. Raises: as `on_chain`."""
    tell(on_chain(session, config, act), as_json)


def tell(mined: Mined, as_json: bool, **more: str) -> None:
    """Say what a transaction did; `more`: what it made, by name."""
    if as_json:
        numbers = {"block": mined.block, "gas": mined.gas, "gas_wei": str(mined.gas_wei)}
        emit({**more, "transaction": hexed(mined.transaction), **numbers})
    else:
        click.echo("".join(f"{name} {value}\n" for name, value in more.items()), nl=False)
        click.echo(f"done in block {mined.block}: transaction {hexed(mined.transaction)}")


def run_quietly(session: Session, config: NodeConfig, work: Any) -> Any:
    """Run a coroutine to its end, warnings only on stderr. Raises: Interrupted, and what `work` raises."""
    from node.cli.running import run

    session.log(config, serving=False)
    return run(work)
