"""A market whose work is judged: providers, a client and validators in one process, over the twins.

Its clock is faster than the wall's, and the chain mines a block for every second of it, as a chain does by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from node.chain.court import encode_proof
from node.discovery.directory import OfferDirectory
from node.ports import CaseRecord, CaseState, CourtEvent, Replayer, Store
from node.transport.memory import MemoryTransport
from node.validator.shelf import Shelf, Volume
from node.validator.validator import Validator, ValidatorSettings
from protocol.eip712 import hash_struct
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Address, Digest, Wei
from tests.spine.lab import LabClock, Market, SystemEntropy, wallet
from tests.twins import court_contract
from tests.twins.engine_twin import EngineTwin
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_court import RULES, CourtWorld, MemoryCourt
from tests.twins.memory_ledger import MemoryLedgerChain
from tests.twins.memory_store import MemoryStore
from tests.twins.replayer_twin import ReplayerTwin

SPEED = 20.0
"""Seconds of the lab per second of the wall."""

STAKE = Wei(200 * WEI_PER_TALLY)

PATIENCE_S = 20.0
"""Seconds of the wall that a test waits for what must happen: 400 of the lab's."""

FAST = replace(RULES, epoch_seconds=4, submit_window=40, reveal_window=15, answer_window=10)


@dataclass
class Judge:
    """A validator and its parts."""

    validator: Validator
    store: Store
    chain: MemoryChain
    court: MemoryCourt
    transport: MemoryTransport
    wallet: Signer
    node_key: Signer
    replayer: Replayer

    @property
    def address(self) -> Address:
        return self.wallet.address

    def stake(self) -> int:
        return self.chain.world.head.state.stakes.get(self.address, 0)


@dataclass
class JudgedMarket(Market):
    """`async with JudgedMarket() as market`: blocks are mined while it is open."""

    world: MemoryLedgerChain = field(
        default_factory=lambda: MemoryLedgerChain(epoch_seconds=0, timestamp=int(time.time()) - 5)
    )
    clock: LabClock = field(default_factory=lambda: LabClock(SPEED))
    judges: list[Judge] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.court = CourtWorld(self.world, FAST)
        self._mining: asyncio.Task[None] | None = None

    async def __aenter__(self) -> JudgedMarket:
        await super().__aenter__()
        self._mining = asyncio.create_task(self._mine())
        self.stack.callback(self._mining.cancel)
        return self

    async def _mine(self) -> None:
        while True:
            behind = self.clock.now_ms() // 1000 - self.world.head.state.timestamp
            if behind > 0:
                self.world.mine(1, behind)
            await self.clock.sleep(1.0)

    async def judge(
        self,
        *,
        replayer: Replayer | None = None,
        store: Store | None = None,
        keys: tuple[Signer, Signer] | None = None,
    ) -> Judge:
        """A validator that knows every seller made so far."""
        account, node_key = keys or (wallet(), wallet())
        if keys is None:
            self.world.fund(account.address, 1000 * WEI_PER_TALLY, 10**18)
        assert self.court is not None
        chain = MemoryChain(self.world, account)
        court = MemoryCourt(self.court, chain)
        store = store or MemoryStore()
        await store.open()
        transport = MemoryTransport(self.network, node_key.secret)
        directory = OfferDirectory(transport, chain, self.clock, tuple(s.peer for s in self.sellers), Wei(1))
        judging = replayer or ReplayerTwin(EngineTwin())
        shelf = Shelf({hash_struct(judging.profile): Volume("twin", judging.profile, lambda: judging)}, self.clock)
        ports = (store, chain, court, transport, directory, self.clock, SystemEntropy())
        settings = ValidatorSettings(STAKE, 1.0)
        validator = Validator(settings, account.address, node_key, shelf, *ports, encode_proof)
        await transport.start()
        await directory.refresh()
        await validator.start()
        self.stack.push_async_callback(store.close)
        self.stack.push_async_callback(transport.stop)
        self.stack.push_async_callback(validator.stop)
        out = Judge(validator, store, chain, court, transport, account, node_key, judging)
        self.judges.append(out)
        return out

    async def judges_of(self, count: int) -> list[Judge]:
        """So many honest validators."""
        return [await self.judge() for _ in range(count)]

    # ------------------------------------------------------------------------------------------------- looking at it

    def events(self, name: str) -> list[CourtEvent]:
        """What the Court logged under a name."""
        return [event for event in court_contract.events(self.world.head.state) if event.name == name]

    async def case_of(self, provider: Address, wanted: Callable[[CaseRecord], bool]) -> CaseRecord:
        """The first case of a provider that is `wanted`, once there is one. Raises: TimeoutError."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for event in self.events("Committed"):
                    case = await self.judges[0].court.case(event.case_id) if event.about == provider else None
                    if case is not None and wanted(case):
                        return case
                await self.world.tick.wait()

    async def closed(self, provider: Address) -> CaseRecord:
        """The provider's first closed case."""
        return await self.case_of(provider, lambda case: case.state in (CaseState.CLOSED, CaseState.UNDECIDED))

    async def committed(self, provider: Address) -> Digest:
        """The provider's first commitment."""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := [e.case_id for e in self.events("Committed") if e.about == provider]):
                await self.world.tick.wait()
        return found[0]
