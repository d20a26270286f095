"""A whole market in one process: real provider, router, directory and session code over the twins.

Time is the machine's, but what only waits for a tariff to come into force jumps.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from incentives.settlement import SettlePolicy
from node.client.accounts import Accounts, SpendingLimits
from node.client.router import ClientSettings, Router
from node.discovery.directory import OfferDirectory
from node.ports import JobDone, JobEvent, JobSpec, JobTokens, ModelCard, PeerAddress, Sampling, Store
from node.provider.offering import OfferTexts
from node.provider.provider import Provider, ProviderSettings
from node.transport.memory import MemoryNetwork, MemoryTransport
from protocol.eip712 import hash_struct
from protocol.messages import Tariff
from protocol.signing import Signer
from protocol.units import BPS, WEI_PER_TALLY, Digest, Wei
from tests.spine.dossiers import examine_all, faults_of
from tests.twins.engine_twin import EOS, EngineTwin
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_court import CourtWorld, MemoryCourt
from tests.twins.memory_ledger import MemoryLedgerChain
from tests.twins.memory_store import MemoryStore

MODEL = "twin-model"

RETENTION_HOURS = 24 * 365
"""Content stays for as long as any test's clock runs, so that what was served can be examined at its end."""


class LabClock:
    """The machine's clock, ahead by however long `jump` was asked for, and `speed` times as fast from its making on."""

    def __init__(self, speed: float = 1.0) -> None:
        self.ahead_s = 0.0
        self.wrong_s = 0.0  # what somebody set the time of day off by; durations do not notice
        self._speed, self._born, self._born_monotonic = speed, time.time(), time.monotonic()
        self.jumper: asyncio.Task[object] | None = None  # whose sleeping moves the clock instead of waiting

    def now_ms(self) -> int:
        return int((self._born + self._faster(time.time() - self._born) + self.wrong_s) * 1000)

    def monotonic(self) -> float:
        return self._born_monotonic + self._faster(time.monotonic() - self._born_monotonic)

    def _faster(self, elapsed_s: float) -> float:
        return elapsed_s * self._speed + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        if self.jumper is not None and asyncio.current_task() is self.jumper:
            self.ahead_s += seconds
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(seconds / self._speed)


class SystemEntropy:
    def token(self, size: int) -> bytes:
        return secrets.token_bytes(size)


def wallet() -> Signer:
    return Signer.from_secret(secrets.token_bytes(32))


def prices(provider: bytes, profile_id: bytes, **changes: int) -> Tariff:
    """A price sheet with round numbers; every tier at x1 and no promises."""
    values = dict.fromkeys((name for name in Tariff.__dataclass_fields__), 0) | {
        "provider": provider,
        "profile_id": profile_id,
        "prompt_price": 10**10,
        "cached_price": 10**9,
        "completion_price": 10**11,
        "reasoning_price": 10**11,
        "flex_bps": BPS,
        "standard_bps": BPS,
        "priority_bps": BPS,
        "long_context_threshold": 1 << 20,
        "long_context_bps": BPS,
        "privacy_bps": BPS,
        "embedding_price": 10**10,
        "base_min_bps": BPS,
        "base_max_bps": BPS,
    }
    return Tariff(**(values | changes))  # type: ignore[arg-type]


@dataclass
class Seller:
    provider: Provider
    engine: EngineTwin
    store: Store
    chain: MemoryChain
    transport: MemoryTransport
    wallet: Signer
    node_key: Signer
    cheats: bool = False
    """What it served would not stand an audit, and its test means it so."""

    @property
    def peer(self) -> PeerAddress:
        return PeerAddress(self.transport.peer_id, self.transport.addresses)


@dataclass
class Buyer:
    router: Router
    accounts: Accounts
    store: Store
    chain: MemoryChain
    transport: MemoryTransport
    wallet: Signer


@dataclass
class Market:
    """`async with Market() as market`; everything made in it is stopped when it is left.

    Then every job that an honest seller receipted has to stand an audit of its documents: whatever a test is about.
    """

    world: MemoryLedgerChain = field(
        default_factory=lambda: MemoryLedgerChain(epoch_seconds=0, timestamp=int(time.time()) - 5)
    )
    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    clock: LabClock = field(default_factory=LabClock)
    court: CourtWorld | None = None  # over `world`; without one nothing is committed to
    sellers: list[Seller] = field(default_factory=list)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Market:
        await self.stack.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stack.aclose()
        if exc[0] is None:
            await self.examine_honest()

    async def examine_honest(self) -> None:
        """Raises: Forged when an honest seller would be condemned for a job; AssertionError for an objective fault."""
        for seller in self.sellers:
            if seller.cheats or not isinstance(seller.store, MemoryStore):
                continue
            alike = [other.node_key.address for other in self.sellers if other.wallet.address == seller.wallet.address]
            await examine_all(seller.store, seller.chain, seller.wallet.address, seller.node_key, tuple(alike))
            found = await faults_of(seller.store, seller.chain)
            assert not found, found

    async def seller(
        self,
        *,
        store: Store | None = None,
        keys: tuple[Signer, Signer] | None = None,
        engine: EngineTwin | None = None,
        card: ModelCard | None = None,
        policy: SettlePolicy | None = None,
        model: str = MODEL,
        bootstrap: tuple[PeerAddress, ...] = (),
        **changes: int,
    ) -> Seller:
        """A serving provider. `changes`: fields of its tariff. `card`: of a real engine, which stops elsewhere."""
        account, node_key = keys or (wallet(), wallet())
        if keys is None:
            self.world.fund(account.address, 1000 * WEI_PER_TALLY, 10**18)
        engine = engine or EngineTwin()
        chain = MemoryChain(self.world, account)
        store = store or MemoryStore()
        await store.open()
        transport = MemoryTransport(self.network, node_key.secret)
        directory = OfferDirectory(transport, chain, self.clock, bootstrap, Wei(1))
        directory.start_serving()
        served = engine.profile
        card = card or ModelCard(model, hash_struct(served), served, b"{}", "", {}, (EOS,), engine.max_context)
        settings = ProviderSettings(
            prices(account.address, card.profile_id, **changes),
            OfferTexts(model, "lab", RETENTION_HOURS, 2048),
            policy or SettlePolicy(3600, Wei(WEI_PER_TALLY), Wei(1)),
            Wei(100 * WEI_PER_TALLY),
            1.0,
        )
        await transport.start()
        provider = Provider(
            settings,
            node_key,
            engine,
            card,
            store,
            chain,
            transport,
            directory,
            self.clock,
            SystemEntropy(),
            None if self.court is None else MemoryCourt(self.court, chain),
        )
        self.clock.jumper = asyncio.current_task()
        try:
            await provider.start()
        finally:
            self.clock.jumper = None
        self.stack.push_async_callback(store.close)
        self.stack.push_async_callback(transport.stop)
        self.stack.push_async_callback(provider.stop)
        out = Seller(provider, engine, store, chain, transport, account, node_key)
        self.sellers.append(out)
        return out

    async def buyer(
        self,
        *,
        tally: int = 1000 * WEI_PER_TALLY,
        deposit: int = WEI_PER_TALLY,
        total: int = 0,
        store: Store | None = None,
        session: Signer | None = None,
        stall_s: float = 5.0,
    ) -> Buyer:
        """A client that knows every seller made so far."""
        account = wallet()
        self.world.fund(account.address, tally, 10**18)
        chain = MemoryChain(self.world, account)
        store = store or MemoryStore()
        await store.open()
        transport = MemoryTransport(self.network, secrets.token_bytes(32))
        directory = OfferDirectory(transport, chain, self.clock, tuple(s.peer for s in self.sellers), Wei(1))
        limits = SpendingLimits(Wei(deposit), Wei(total))
        accounts = Accounts(session or wallet(), account.address, limits, store, chain)
        settings = ClientSettings(Wei(WEI_PER_TALLY), stall_s)
        router = Router(settings, accounts, store, transport, directory, self.clock, SystemEntropy())
        await router.start()
        await transport.start()
        await directory.refresh()
        self.stack.push_async_callback(store.close)
        self.stack.push_async_callback(transport.stop)
        self.stack.push_async_callback(router.stop)
        return Buyer(router, accounts, store, chain, transport, account)


def spec(max_tokens: int = 100, prompt: tuple[int, ...] = (5, 6, 7, 8), **changes: object) -> JobSpec:
    return JobSpec(MODEL, prompt, max_tokens, Sampling(), **changes)  # type: ignore[arg-type]


async def run(buyer: Buyer, job: JobSpec) -> tuple[list[int], JobDone, list[JobEvent]]:
    """Every token, the end, and all events of a job."""
    tokens: list[int] = []
    events: list[JobEvent] = []
    done: JobDone | None = None
    async for event in buyer.router.run(job):
        events.append(event)
        if isinstance(event, JobTokens):
            tokens.extend(event.token_ids)
        if isinstance(event, JobDone):
            done = event
    assert done is not None, "a job that ends without an error ends with JobDone"
    return tokens, done, events


def expected(engine: EngineTwin, seed: Digest, job: JobSpec) -> list[int]:
    """What the twin writes for this seed, undisturbed."""
    return [engine.token(seed, len(job.prompt) + i) for i in range(job.max_tokens)]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds; fails after 10 s."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def idle(seller: Seller) -> None:
    """Until the seller has closed every job in its journal."""
    await until(lambda: not seller.provider.server.running)
