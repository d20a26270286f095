"""Validators that crash, come late, stay silent or lie, on the Court's twin, in any order Hypothesis can think of.

What must hold whatever happens: nobody honest is ever slashed, what a validator submits and reveals is what its journal
holds, and once everybody is back every case comes to an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
from eth_hash.auto import keccak
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from incentives.audit_draw import case_key, lot_of, pack_gaps
from incentives.verdicts import JobFinding
from node.chain.court import encode_proof
from node.ports import CaseState
from node.transport.memory import MemoryNetwork, MemoryTransport
from node.validator import cases as cases_module
from node.validator.audit import Docket, Looked, Recused
from node.validator.cases import JOURNALED, REVEALED, SUBMITTED
from node.validator.shelf import Shelf, Volume
from node.validator.validator import Validator, ValidatorSettings
from protocol import merkle
from protocol.eip712 import hash_struct
from protocol.messages import Commitment
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, AuditOutcome, Digest, Wei
from tests.node.chain.court_bench import PROFILE, STAKE, entries
from tests.twins import court_contract
from tests.twins.engine_twin import EngineTwin
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_court import RULES, CourtWorld, MemoryCourt
from tests.twins.memory_ledger import MemoryLedgerChain
from tests.twins.memory_store import MemoryStore
from tests.twins.replayer_twin import ReplayerTwin

T = TypeVar("T")

VALIDATORS = 5
LIAR = VALIDATORS - 1
GAPS = pack_gaps(range(200, 3_400, 200))
NO_GAPS = pack_gaps(())
CRASHES = ("looking", JOURNALED, SUBMITTED, REVEALED)


SLOW = replace(RULES, submit_window=120, reveal_window=90, answer_window=20)
"""Each transaction takes a second here, and validators look one after the other."""


class Died(Exception):
    """The process is gone."""


class ChainTime:
    """A clock that shows the newest block's time; nobody waits for anything."""

    def __init__(self, world: MemoryLedgerChain) -> None:
        self._world = world

    def now_ms(self) -> int:
        return self._world.head.state.timestamp * 1_000

    def monotonic(self) -> float:
        return float(self._world.head.state.timestamp)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class CountingEntropy:
    """Other bytes every time, the same in every run."""

    def __init__(self, name: int) -> None:
        self._name, self._count = name, 0

    def token(self, size: int) -> bytes:
        self._count += 1
        return keccak(b"%d|%d" % (self._name, self._count))[:size]


class NoOffers:
    """The Directory port without an offer: the auditor of these tests needs none."""

    async def announce(self, envelope: object) -> None: ...

    async def refresh(self) -> None: ...

    def offers(self) -> list[Any]:
        return []


@dataclass
class StubAuditor:
    """Finds what is there, or, of a liar, what is not. `dies`: in the middle of it."""

    truth: dict[Digest, AuditOutcome]
    lies: bool
    dies: bool = False
    recuses: bool = False

    def notice(self) -> None: ...

    async def look(self, docket: Docket) -> Looked:
        if self.dies:
            raise Died
        if self.recuses:
            raise Recused("pays for a job in it")
        outcome = self.truth[docket.record.key]
        if self.lies:
            honest = outcome is AuditOutcome.PASS
            outcome = AuditOutcome.IMPROBABLE if honest else AuditOutcome.PASS
        flags = 30 if outcome is AuditOutcome.IMPROBABLE else 0
        finding = JobFinding(entries(1)[0].job_id, outcome, 64, flags)
        return Looked((finding,), NO_GAPS if self.lies else GAPS, ())


class Court(RuleBasedStateMachine):
    """Provider 0 is honest and provider 1 is not; the last validator always claims the opposite."""

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.world = MemoryLedgerChain()
        self.court = CourtWorld(self.world, SLOW)
        self.truth: dict[Digest, AuditOutcome] = {}
        self.stores = [MemoryStore() for _ in range(VALIDATORS)]
        self.up: list[Validator | None] = [None] * VALIDATORS
        self.wallets = [_signer(b"wallet", i) for i in range(VALIDATORS)]
        self.keys = [_signer(b"node", i) for i in range(VALIDATORS)]
        self.providers = [(_signer(b"provider", i), _signer(b"provider key", i)) for i in range(2)]
        self.armed = ""
        self.crashed = False
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(cases_module, "crash_point", self._pass)
        self.run(self._found())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    async def _found(self) -> None:
        for wallet, key in [*self.providers, *zip(self.wallets, self.keys, strict=True)]:
            self.world.fund(wallet.address, 1_000 * WEI_PER_TALLY, 10**18)
            await MemoryChain(self.world, wallet).register_provider(key.secret, STAKE)
        chain = MemoryChain(self.world, self.providers[0][0])
        await MemoryCourt(self.court, chain).register_profile(PROFILE)
        for index in range(VALIDATORS):
            await self._start(index)

    async def _start(self, index: int) -> None:
        chain = MemoryChain(self.world, self.wallets[index])
        court, clock = MemoryCourt(self.court, chain), ChainTime(self.world)
        store = self.stores[index]
        await store.open()
        replayer = ReplayerTwin(EngineTwin())
        shelf = Shelf({hash_struct(PROFILE): Volume("twin", PROFILE, lambda: replayer)}, clock)
        transport = MemoryTransport(MemoryNetwork(), self.keys[index].secret)
        ports = (store, chain, court, transport, NoOffers(), clock, CountingEntropy(index))
        made = Validator(
            ValidatorSettings(Wei(STAKE), 3600.0),
            self.wallets[index].address,
            self.keys[index],
            shelf,
            *ports,
            encode_proof,
        )
        stub = StubAuditor(self.truth, index == LIAR)
        made._auditor = made.cases._auditor = stub  # type: ignore[assignment]
        await made._join()
        self.up[index] = made

    def _pass(self, name: str) -> None:
        if name == self.armed:
            self.crashed = True
            raise Died

    # ------------------------------------------------------------------------------------------------------- rules

    @rule(cheats=st.booleans())
    def commit(self, cheats: bool) -> None:
        """A provider commits to the epoch that just ended."""
        wallet, key = self.providers[cheats]
        epoch = self.world.head.state.timestamp // RULES.epoch_seconds
        case = case_key(wallet.address, hash_struct(PROFILE), epoch)
        if case in self.truth:
            return
        self.world.advance((epoch + 1) * RULES.epoch_seconds - self.world.head.state.timestamp)
        jobs = entries(2, b"%d" % epoch)
        root = merkle.root(jobs)
        made = Commitment(wallet.address, hash_struct(PROFILE), epoch, root.hash, 2, root.total, lot_of(b"\x01" * 32))
        self.truth[case] = AuditOutcome.IMPROBABLE if cheats else AuditOutcome.PASS
        court = MemoryCourt(self.court, MemoryChain(self.world, wallet))
        self.run(court.post_commitment(made, key.sign(court.domain, made)))

    @rule(blocks=st.integers(1, 3), seconds=st.integers(1, 25))
    def time_passes(self, blocks: int, seconds: int) -> None:
        self.world.mine(blocks, seconds)

    @rule(index=st.integers(0, VALIDATORS - 1))
    def look(self, index: int) -> None:
        """A validator looks; one that is down stays silent."""
        self.run(self._look(index))

    async def _look(self, index: int) -> None:
        validator = self.up[index]
        if validator is None:
            return
        await validator.look()
        while tasks := [*validator._working.values(), *validator.cases._audits.values()]:
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)

    @rule(index=st.integers(0, VALIDATORS - 1), where=st.sampled_from(CRASHES))
    def crash(self, index: int, where: str) -> None:
        """A validator dies while it looks, if it comes by that point."""
        validator = self.up[index]
        if validator is None:
            return
        stub: Any = validator._auditor
        self.armed, stub.dies = where, where == "looking"
        self.crashed = stub.dies
        self.run(self._look(index))
        self.armed, stub.dies = "", False
        if self.crashed:
            self.up[index] = None
            self.run(self._end(validator, index))

    async def _end(self, validator: Validator, index: int) -> None:
        await validator.stop()
        await self.stores[index].close()

    @rule(index=st.integers(0, VALIDATORS - 1))
    def restart(self, index: int) -> None:
        if self.up[index] is None:
            self.run(self._start(index))

    # -------------------------------------------------------------------------------------------------- what holds

    @invariant()
    def nobody_honest_is_slashed(self) -> None:
        if not hasattr(self, "world"):
            return
        stakes = self.world.head.state.stakes
        assert stakes[self.providers[0][0].address] == STAKE
        assert all(stakes[wallet.address] == STAKE for wallet in self.wallets[:LIAR])

    @invariant()
    def what_is_on_chain_is_what_is_in_the_journal(self) -> None:
        if not hasattr(self, "world"):
            return
        for event in court_contract.events(self.world.head.state):
            if event.name == "Submitted":
                index = [wallet.address for wallet in self.wallets].index(event.about)
                row = self.stores[index]._verdicts.get((event.case_id, event.values["round"]))
                assert row is not None and row.record.digest == event.values["digest"]

    def teardown(self) -> None:
        """Everybody comes back, time passes, and every case is over as it should be."""
        if not hasattr(self, "runner"):
            return
        try:
            self.run(self._finish())
        finally:
            self.patch.undo()
            self.runner.close()

    async def _finish(self) -> None:
        late = set(self.truth) - {event.case_id for event in self._events("Drawn")}
        for index in range(VALIDATORS):
            if self.up[index] is None:
                await self._start(index)
        for _ in range(120):
            self.world.mine(2, 3)
            for index in range(VALIDATORS):
                await self._look(index)
            if all(self._state(key) in (CaseState.CLOSED, CaseState.UNDECIDED) for key in self.truth):
                break
        for key, truth in self.truth.items():
            assert self._state(key) in (CaseState.CLOSED, CaseState.UNDECIDED), "everybody is there, so it ends"
            if key in late:
                case = court_contract.case(self.world.head.state, key)
                assert case is not None and (case.state, case.outcome) == (CaseState.CLOSED, truth)
        self.nobody_honest_is_slashed()
        for index, validator in enumerate(self.up):
            if validator is not None:
                await self._end(validator, index)

    def _events(self, name: str) -> list[Any]:
        return [event for event in court_contract.events(self.world.head.state) if event.name == name]

    def _state(self, key: Digest) -> CaseState:
        case = court_contract.case(self.world.head.state, key)
        return CaseState.NONE if case is None else case.state


def _signer(name: bytes, index: int) -> Signer:
    return Signer.from_secret(keccak(name + b"%d" % index))


TestCourt = Court.TestCase
TestCourt.settings = settings(
    max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
