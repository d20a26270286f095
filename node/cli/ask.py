"""Questions to this home's journal, whether or not a node runs in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from node.cli.failures import CommandFailed
from node.routes import Route, journal_routes
from protocol.eip712 import Domain

if TYPE_CHECKING:
    from node.cli.session import Session
    from node.config import NodeConfig


Call = Callable[..., Awaitable[dict[str, Any]]]
"""`await call("route", name=value)`."""


@asynccontextmanager
async def asking(session: Session, config: NodeConfig) -> AsyncIterator[Call]:
    """Many journal routes: answered by the node that runs in this home, else from the journal, opened once.

    Raises: StoreError, ChainError; CommandFailed when there is no journal. A call raises: ControlRefused, TallyError.
    """
    from node.gateway.control import ControlRefused, ControlUnavailable

    control = session.control()
    try:
        with suppress(ControlRefused):
            await control.call("facts")
    except ControlUnavailable:
        async with _opened(config) as routes:

            async def call(route: str, **params: Any) -> dict[str, Any]:
                return await routes[route](params)

            yield call
    else:
        yield control.call


async def ask(session: Session, config: NodeConfig, route: str, **params: Any) -> dict[str, Any]:
    """Answer a journal route: by the node that runs in this home, else from the journal itself.

    Raises: ControlRefused, StoreError, ChainError; CommandFailed when there is no journal.
    """
    from node.gateway.control import ControlUnavailable

    try:
        return await session.control().call(route, **params)
    except ControlUnavailable:
        pass
    async with _opened(config) as routes:
        return await routes[route](params)


@asynccontextmanager
async def _opened(config: NodeConfig) -> AsyncIterator[dict[str, Route]]:
    """The routes of this home's journal, which no node holds. Raises: StoreError, ChainError, CommandFailed."""
    if not config.journal.exists():
        raise CommandFailed(
            f"there is no journal in {config.home}: nothing was sold or bought from here yet",
            do="`tally provider run` or `tally run` starts one; --home names another home",
        )
    from node.app import journal

    async with journal(config) as store:
        yield journal_routes(store, domain_of(config))


def domain_of(config: NodeConfig) -> Domain:
    """The domain this home's documents are signed under. Raises: ChainError."""
    from node.chain.deployment import Deployment

    return Deployment.load(config.chain.deployment).domain
