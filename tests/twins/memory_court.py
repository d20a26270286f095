"""MemoryCourt: the Court port over the world of MemoryChain, for any number of wallets.

The storage lies in the world's blocks, so a reorganisation takes it back as it takes back everything else. Time is the
newest block's: a test moves it with `world.mine` and `world.advance`, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from node.ports import (
    CaseMember,
    CaseRecord,
    CommitmentRecord,
    CourtEvent,
    CourtRules,
    Mined,
)
from protocol.eip712 import Domain
from protocol.merkle import Entry, SumNode
from protocol.messages import Commitment, Profile, Verdict, WorkReceipt
from protocol.units import WEI_PER_TALLY, Address, Digest, Wei
from tests.twins import court_contract as contract
from tests.twins.court_contract import CourtConstants
from tests.twins.memory_chain import MemoryChain
from tests.twins.memory_contracts import State
from tests.twins.memory_ledger import MemoryLedgerChain

TALLY = WEI_PER_TALLY

RULES = CourtRules(
    epoch_seconds=5,
    commit_window=120,
    submit_window=30,
    reveal_window=10,
    answer_window=8,
    committees=(3, 4, 5),
    validator_stake=Wei(100 * TALLY),
    validator_penalty=Wei(20 * TALLY),
    appeal_bond=Wei(10 * TALLY),
)
"""As devnet/deploy.py has them."""


@dataclass(frozen=True, slots=True)
class CourtWorld:
    """The deployed Court of a world."""

    world: MemoryLedgerChain
    rules: CourtRules = RULES

    def constants(self) -> CourtConstants:
        """What the contract's functions need beside a state: of the block that is made next."""
        world = self.world
        number = len(world.blocks)
        return CourtConstants(self.rules, world.domain, number, lambda n: world.blocks[n].hash)

    def view(self) -> State:
        """The newest state, for assertions."""
        return self.world.head.state


class MemoryCourt:
    """Implements the Court port for the wallet of `chain`."""

    def __init__(self, court: CourtWorld, chain: MemoryChain) -> None:
        self._court, self._chain = court, chain

    @property
    def domain(self) -> Domain:
        return self._court.world.domain

    # ---------------------------------------------------------------------------------------------------- reading

    async def rules(self) -> CourtRules:
        self._state()
        return self._court.rules

    async def now(self) -> int:
        return self._state().timestamp

    async def events(self, first_block: int) -> tuple[list[CourtEvent], int]:
        last = (await self._chain.confirmed_head()).number
        found = contract.events(self._state(confirmed=True))
        return [event for event in found if event.block >= first_block], last + 1

    async def commitment(self, key: Digest) -> CommitmentRecord | None:
        made = contract.commitment(self._state(confirmed=True), key)
        return None if made is None else made.record

    async def case(self, case_id: Digest) -> CaseRecord | None:
        case = contract.case(self._state(), case_id)
        if case is None:
            return None
        members = tuple(
            CaseMember(seat.validator, seat.submitted, seat.verdict, seat.credited) for seat in case.rounds[case.round]
        )
        return CaseRecord(
            case.id,
            case.provider,
            case.profile_id,
            case.epoch,
            case.state,
            case.round,
            case.until,
            case.outcome,
            members,
            case.evidence,
            Wei(case.slashed),
            case.was_forced,
        )

    async def validators(self) -> tuple[Address, ...]:
        return contract.validators(self._state())

    async def evidence(self, provider: Address) -> int:
        return contract.evidence(self._state(), provider).value

    async def credits(self, validator: Address) -> tuple[int, int]:
        return contract.credits_and_missed(self._state(), validator)

    async def profile_registered(self, profile_id: Digest) -> bool:
        return contract.flag_ppm(self._state(), profile_id) > 0

    # ---------------------------------------------------------------------------------------------------- writing

    async def register_profile(self, profile: Profile) -> Mined:
        return await self._send("registerProfile", lambda s, k, me: contract.register_profile(s, k, profile))

    async def enlist(self) -> Mined:
        return await self._send("enlist", contract.enlist)

    async def retire(self) -> Mined:
        return await self._send("retire", contract.retire)

    async def post_commitment(self, commitment: Commitment, signature: bytes) -> Mined:
        return await self._send("commit", lambda s, k, me: contract.commit(s, k, commitment, signature))

    async def draw(self, case_id: Digest) -> Mined:
        return await self._send("draw", lambda s, k, me: contract.draw(s, k, case_id))

    async def submit(self, case_id: Digest, verdict_digest: Digest) -> Mined:
        return await self._send("submit", lambda s, k, me: contract.submit(s, k, me, case_id, verdict_digest))

    async def reveal(self, verdict: Verdict) -> Mined:
        return await self._send("reveal", lambda s, k, me: contract.reveal(s, k, me, verdict))

    async def conclude(self, case_id: Digest) -> Mined:
        return await self._send("conclude", lambda s, k, me: contract.conclude(s, k, case_id))

    async def execute(self, case_id: Digest) -> Mined:
        return await self._send("execute", lambda s, k, me: contract.execute(s, k, case_id))

    async def answer(self, case_id: Digest, secret: bytes) -> Mined:
        return await self._send("answer", lambda s, k, me: contract.answer(s, k, me, case_id, secret))

    async def appeal(self, case_id: Digest) -> Mined:
        return await self._send("appeal", lambda s, k, me: contract.appeal(s, k, me, case_id))

    async def prove(self, kind: int, proof: bytes) -> Mined:
        return await self._send("prove", lambda s, k, me: contract.prove(s, k, me, kind, proof))

    async def compensation(
        self, case_id: Digest, entry: Entry, index: int, siblings: Sequence[SumNode], receipt: WorkReceipt
    ) -> Mined:
        path = tuple(siblings)
        return await self._send(
            "compensate", lambda s, k, me: contract.compensate(s, k, case_id, entry, index, path, receipt)
        )

    # ---------------------------------------------------------------------------------------------------- inside

    def _state(self, *, confirmed: bool = False) -> State:
        return self._chain.seen_state(confirmed=confirmed)

    async def _send(self, action: str, run: Callable[[State, CourtConstants, Address], object]) -> Mined:
        me = self._chain.sender(action)
        return await self._chain.transact(action, lambda state: run(state, self._court.constants(), me))


__all__ = ["RULES", "CourtWorld", "MemoryCourt"]
