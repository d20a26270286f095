"""Questions to this home's journal, whether or not a node runs in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from node.cli.failures import CommandFailed
from node.routes import journal_routes
from protocol.eip712 import Domain

if TYPE_CHECKING:
    from node.cli.session import Session
    from node.config import NodeConfig


async def ask(session: Session, config: NodeConfig, route: str, **params: Any) -> dict[str, Any]:
    """Answer a journal route: by the node that runs in this home, else from the journal itself.

    Raises: ControlRefused, StoreError, ChainError; CommandFailed when there is no journal.
    """
    from node.gateway.control import ControlUnavailable

    try:
        return await session.control().call(route, **params)
    except ControlUnavailable:
        pass
    if not config.journal.exists():
        raise CommandFailed(
            f"there is no journal in {config.home}: nothing was sold or bought from here yet",
            do="`tally provider run` or `tally run` starts one; --home names another home",
        )
    from node.app import journal

    async with journal(config) as store:
        return await journal_routes(store, domain_of(config))[route](params)


def domain_of(config: NodeConfig) -> Domain:
    """The domain this home's documents are signed under. Raises: ChainError."""
    from node.chain.deployment import Deployment

    return Deployment.load(config.chain.deployment).domain
