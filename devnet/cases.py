"""The Court's cases as they go, told by the chain alone: who was audited, how each member voted, what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from devnet.audit import EVERYTHING
from devnet.processes import NodeProcess
from node.chain.chain import Web3Chain
from node.chain.court import Web3Court
from node.chain.deployment import Deployment
from node.cli.money import tally
from node.gateway.control import ControlClient
from node.ports import CaseState, Court, CourtEvent
from node.system import SystemClock
from protocol.units import Address, AuditOutcome, Digest, Wei

LOOK_S: Final = 0.5
"""Between looks at the Court. Unit: s. A devnet's blocks come every second."""

OVER: Final = (CaseState.CLOSED, CaseState.UNDECIDED)

_WAD: Final = 10**18

ZERO_WEI: Final = Wei(0)


@dataclass(frozen=True, slots=True)
class Vote:
    """A verdict that one member revealed. `tokens`, `flags`, `voids`: over all the jobs it looked at."""

    validator: str
    round: int
    outcome: AuditOutcome
    tokens: int
    flags: int
    voids: int


@dataclass(slots=True)
class Case:
    """One commitment of one provider, and its case. `jobs`: committed. `evidence`: the provider's e-value after it."""

    id: Digest
    provider: str
    epoch: int
    jobs: int
    votes: list[Vote] = field(default_factory=list)
    state: CaseState = CaseState.NONE
    outcome: AuditOutcome = AuditOutcome.PASS
    evidence: float = 1.0
    slashed: Wei = ZERO_WEI

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def guilty(self) -> bool:
        """Whether it ended with somebody punished for what was found."""
        return self.state is CaseState.CLOSED and self.outcome not in (AuditOutcome.PASS, AuditOutcome.VOID)

    @property
    def verdict(self) -> str:
        """In a word, as a table shows it."""
        return self.outcome.name if self.state is CaseState.CLOSED else self.state.name.lower()

    @property
    def decisive(self) -> list[Vote]:
        """The votes of the last round."""
        last = max((vote.round for vote in self.votes), default=0)
        return [vote for vote in self.votes if vote.round == last]

    @property
    def agreeing(self) -> Vote | None:
        """Of the votes that carried the outcome the middle one, as the Court takes it: a liar may be among them."""
        agreed = sorted((v for v in self.decisive if v.outcome is self.outcome), key=lambda v: (v.tokens, v.flags))
        return agreed[(len(agreed) - 1) // 2] if agreed else None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        facts = {"case": "0x" + self.id.hex(), "provider": self.provider, "epoch": self.epoch, "jobs": self.jobs}
        votes = [{**asdict(vote), "outcome": vote.outcome.name} for vote in self.votes]
        seen = self.agreeing
        numbers = {"tokens": seen.tokens, "flags": seen.flags} if seen else {"tokens": 0, "flags": 0}
        end = {"verdict": self.verdict, "evidence": self.evidence, "slashed_wei": self.slashed}
        return {**facts, **numbers, **end, "votes": votes}


def told(case: Case) -> str:
    """The end of a case, in a line."""
    seen = case.agreeing
    found = f"{seen.flags} of {seen.tokens} tokens flagged" if seen else "no verdict carried it"
    slashed = f"; {tally(case.slashed)} TALLY slashed" if case.slashed else ""
    return f"{case.provider}, epoch {case.epoch}: {case.jobs} jobs, {found}: {case.verdict}{slashed}"


async def jobs_receipted(gateway: NodeProcess) -> int:
    """Jobs that the running gateway holds a receipt for: so many must their providers commit to."""
    client = ControlClient(gateway.home / "control.sock")
    answer = await asyncio.to_thread(client.call_now, "receipts", 20.0, final=False, limit=EVERYTHING)
    return len({receipt["job_id"] for receipt in answer["receipts"]})


@asynccontextmanager
async def open_court(rpc_url: str, deployment: Deployment) -> AsyncIterator[Court]:
    """The Court to look at; it acts for nobody. Raises: ChainUnavailable, ChainError."""
    clock = SystemClock()
    chain = Web3Chain(rpc_url, deployment, None, clock=clock)
    await chain.start()
    try:
        yield Web3Court(chain, clock)
    finally:
        await chain.stop()


class CourtWatch:
    """Follows every case from the first block on. `names`: wallets as they are shown. `closed`: told of each end."""

    def __init__(self, court: Court, names: Mapping[Address, str], closed: Callable[[Case], None]) -> None:
        self._court, self._names, self._closed = court, names, closed
        self._next_block = 0
        self.cases: dict[Digest, Case] = {}

    async def until_over(self, jobs: int, patience_s: float) -> bool:
        """Until at least so many jobs are committed to and every case of them is over; False when that takes longer.

        Raises: ChainUnavailable.
        """
        deadline = time.monotonic() + patience_s
        while True:
            await self.look()
            cases = self.cases.values()
            if sum(case.jobs for case in cases) >= jobs and all(case.over for case in cases):
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_S)

    def standing(self) -> str:
        """What is not over, and how many jobs are in what is."""
        still = ", ".join(
            f"{case.provider} epoch {case.epoch} {case.verdict}" for case in self.cases.values() if not case.over
        )
        return f"{sum(case.jobs for case in self.cases.values())} jobs committed to; not over: {still or 'nothing'}"

    async def look(self) -> None:
        """Take in what is new. Raises: ChainUnavailable."""
        events, self._next_block = await self._court.events(self._next_block)
        for event in events:
            self._take(event)
        for case in [case for case in self.cases.values() if not case.over]:
            record = await self._court.case(case.id)
            if record is None:
                continue
            case.state, case.outcome, case.slashed = record.state, record.outcome, record.slashed
            case.evidence = record.evidence / _WAD
            if case.over:
                self._closed(case)

    def _take(self, event: CourtEvent) -> None:
        case = self.cases.get(event.case_id)
        if event.name == "Committed" and case is None:
            provider, values = self._name(event.about), event.values
            self.cases[event.case_id] = Case(event.case_id, provider, int(values["epoch"]), int(values["count"]))
        elif event.name == "Revealed" and case is not None:
            values = event.values
            outcome = AuditOutcome(int(values["outcome"]))
            numbers = (int(values[name]) for name in ("tokens", "flags", "voids"))
            case.votes.append(Vote(self._name(event.about), int(values["round"]), outcome, *numbers))

    def _name(self, wallet: Address) -> str:
        return self._names.get(wallet, "0x" + wallet.hex()[:8])
