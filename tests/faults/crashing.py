"""A market in memory whose roles can die at any crash point and come back from their journals.

What kill -9 does to a process is done to a role: from that moment it writes nothing, sends nothing and asks the chain
nothing, whatever its coroutines still try. Its journal and its keys stay, and a new role is built on them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import node.crashpoints as points
from incentives.ledger import ChannelKey, Record, Role
from incentives.settlement import SettlePolicy
from node.crashpoints import STORE_AFTER, STORE_BEFORE, STORE_WRITE_AFTER, STORE_WRITE_BEFORE
from node.ports import JobStarted, JobTokens
from protocol.errors import TallyError
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, JobId, Wei
from tests.spine.lab import Buyer, Market, Seller, spec, until, wallet
from tests.twins.memory_store import MemoryStore

POLICY = SettlePolicy(0, Wei(0), Wei(1))
"""Settle whatever is due, at once: so that settlements are among what a crash can hit."""


class Crashed(BaseException):
    """The role is dead. No `except Exception` of its own may go on after it."""


@dataclass
class Fuse:
    """Kills a role at the `count`-th pass of a point, once."""

    role: Role
    point: str
    count: int = 1
    blown: asyncio.Event = field(default_factory=asyncio.Event)

    def passed(self, point: str) -> bool:
        """Whether this pass is the deadly one."""
        if point != self.point or self.blown.is_set():
            return False
        self.count -= 1
        if self.count:
            return False
        self.blown.set()
        return True


class MortalStore(MemoryStore):
    """A journal that passes the store's crash points as SqlStore does, and keeps nothing once its node is dead."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.role = role
        self.fuse: Fuse | None = None
        self.dead = False
        self.on_death: Callable[[], None] = lambda: None

    def pass_point(self, point: str) -> None:
        """Raises: Crashed at the armed point and ever after."""
        if self.dead:
            raise Crashed(point)
        if self.fuse is not None and self.fuse.role is self.role and self.fuse.passed(point):
            self.dead = True
            self.on_death()
            raise Crashed(point)

    async def write(self, *records: Record) -> None:
        for point in (STORE_WRITE_BEFORE, *(STORE_BEFORE[type(record)] for record in records)):
            self.pass_point(point)
        await super().write(*records)
        for point in (*(STORE_AFTER[type(record)] for record in records), STORE_WRITE_AFTER):
            self.pass_point(point)

    async def put_value(self, key: str, value: bytes) -> None:
        if self.dead:
            raise Crashed(key)
        await super().put_value(key, value)


PREFIXES = {"provider.": Role.PROVIDER, "settler.": Role.PROVIDER, "client.": Role.CLIENT}


def roles_of(point: str) -> tuple[Role, ...]:
    """Who passes a point: both for the store's, the one it is named after for the others."""
    return next(((role,) for prefix, role in PREFIXES.items() if point.startswith(prefix)), tuple(Role))


@contextlib.contextmanager
def code_points(stores: list[MortalStore]) -> Iterator[None]:
    """Points in the code (not the store's) go to the store of the role they are named after."""

    class Everything(dict[str, int]):
        def __contains__(self, name: object) -> bool:
            return True

    def passed(name: str) -> None:
        for store in stores:
            if store.role in roles_of(name) and not name.startswith("store."):
                store.pass_point(name)

    armed, real = points._armed, points._pass
    points._armed, points._pass = Everything(), passed  # type: ignore[misc]
    try:
        yield
    finally:
        points._armed, points._pass = armed, real  # type: ignore[misc]


def _without_obituaries(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What the tasks of the dead raise is no news."""
    if not isinstance(context.get("exception"), Crashed):
        loop.default_exception_handler(context)


class MortalMarket:
    """One seller and one buyer, either of which may be armed. Leave it by `async with`."""

    def __init__(self) -> None:
        self.market = Market()
        self.stores = {role: MortalStore(role) for role in Role}
        self._stack = contextlib.AsyncExitStack()
        self.session = wallet()
        self.wallets: tuple[Signer, Signer] | None = None
        self.seen: dict[JobId, int] = {}
        self.seller: Seller
        self.buyer: Buyer

    async def __aenter__(self) -> MortalMarket:
        asyncio.get_running_loop().set_exception_handler(_without_obituaries)
        self._stack.enter_context(code_points(list(self.stores.values())))
        await self._stack.enter_async_context(self.market)
        await self._open_seller()
        await self._open_buyer()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for role in Role:
            await self.bury(role)
        self.market.stack.pop_all()  # the dead are not stopped in order
        await self._stack.aclose()

    async def _open_seller(self) -> None:
        store = self.stores[Role.PROVIDER]
        self.seller = await self.market.seller(store=store, keys=self.wallets, policy=POLICY)
        self.wallets = self.seller.wallet, self.seller.node_key
        store.on_death = partial(self._cut_off, self.seller)

    async def _open_buyer(self) -> None:
        store = self.stores[Role.CLIENT]
        self.buyer = await self.market.buyer(store=store, session=self.session, deposit=WEI_PER_TALLY)
        store.on_death = partial(self._cut_off, self.buyer)

    def _cut_off(self, party: Seller | Buyer) -> None:
        """At the very moment of death: no frame and no call to the chain leaves any more."""
        party.chain.down = True
        for address in party.transport.addresses:
            self.market.network.detach(party.transport, address)

    def arm(self, fuse: Fuse) -> None:
        self.stores[fuse.role].fuse = fuse

    async def bury(self, role: Role) -> None:
        """End a role as kill -9 does: its sockets close, its tasks stop, its chain access is gone."""
        store = self.stores[role]
        store.dead = True
        party = self.seller if role is Role.PROVIDER else self.buyer
        self._cut_off(party)
        await party.transport.stop()
        if role is Role.PROVIDER:
            tasks, self.seller.provider._tasks = self.seller.provider._tasks, []
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await store.close()

    async def revive(self, role: Role) -> None:
        """The same journal and keys, a new process."""
        store = self.stores[role]
        store.dead, store.fuse = False, None
        if role is Role.PROVIDER:
            self.market.sellers.remove(self.seller)
            await self._open_seller()
            for checked in self.seller.provider.offering._directory.offers():
                await self.buyer.router._directory.consider(checked.envelope)  # type: ignore[attr-defined]
        else:
            await self._open_buyer()

    async def job(self, tokens: int) -> bool:
        """Run a job; whether it ended well. What its reader saw of each attempt is added to `seen`."""
        current: JobId | None = None
        try:
            async for event in self.buyer.router.run(spec(tokens)):
                if isinstance(event, JobStarted):
                    current = event.job_id
                    self.seen[current] = 0
                elif isinstance(event, JobTokens) and current is not None:
                    self.seen[current] += len(event.token_ids)
        except (TallyError, Crashed):
            return False
        return True

    async def until_dead(self, fuse: Fuse, tokens: int) -> None:
        """Run a job until the fuse blows or everything about it is over; who died is buried at once."""
        job = asyncio.create_task(self.job(tokens))
        blown = asyncio.create_task(fuse.blown.wait())
        async with asyncio.timeout(20):
            await asyncio.wait({job, blown}, return_when=asyncio.FIRST_COMPLETED)
            if not fuse.blown.is_set():
                await self._settled()
        blown.cancel()
        if fuse.blown.is_set():
            await self.bury(fuse.role)
        await job

    async def _settled(self) -> None:
        """Until the provider has everything of its vouchers, or died of it."""
        store = self.stores[Role.PROVIDER]
        await until(lambda: store.dead or not self.seller.provider.server.running)
        await until(lambda: store.dead or all(c.unclaimed == 0 for c, _ in self.seller.provider.books.channels()))

    @property
    def key(self) -> ChannelKey:
        return ChannelKey(self.seller.wallet.address, self.session.address)
