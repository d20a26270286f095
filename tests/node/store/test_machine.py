"""Random valid histories: the store on disk against the one in memory, closed and opened in between."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from incentives.ledger import Record, Role
from node.ports import StoreError
from node.store import SqlStore
from tests.node.store import samples as s
from tests.twins.memory_store import MemoryStore

CLIENTS = 2


class Histories(RuleBasedStateMachine):
    """`totals`: per (role, client, job) the total of each acknowledged job, kept apart from both stores."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp())
        self.sql = SqlStore(self.directory / "journal.db")
        self.memory = MemoryStore()
        self.totals: dict[tuple[Role, int, int], int] = {}
        self.steps: dict[tuple[Role, int], int] = {}
        self.unvouched: dict[int, Any] = {}
        self.promised: dict[tuple[Role, int], int] = {}
        self.seen: dict[tuple[Role, int], int] = {}
        self.settlements = 0
        self.history: list[Record] = []

    @initialize()
    def open(self) -> None:
        self._run(self.sql.open())
        self._run(self.memory.open())

    def teardown(self) -> None:
        self._run(self.sql.close())
        self.loop.close()
        shutil.rmtree(self.directory)

    def _run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def _write(self, *records: Record) -> None:
        self._run(self.memory.write(*records))
        self._run(self.sql.write(*records))
        self.history.extend(records)

    @rule(role=st.sampled_from(Role), of=st.integers(0, CLIENTS - 1))
    def open_a_job(self, role: Role, of: int) -> None:
        job = len(self.steps)
        self._write(s.opened(job, role, of))
        self.steps[role, job] = 0
        self.totals[role, of, job] = 0

    @precondition(lambda self: self._jobs(Role.PROVIDER))
    @rule(data=st.data(), more=st.integers(0, 500))
    def issue(self, data: st.DataObject, more: int) -> None:
        of, job = data.draw(st.sampled_from(self._jobs(Role.PROVIDER)))
        self.steps[Role.PROVIDER, job] += 1
        made = s.issued(job, self.steps[Role.PROVIDER, job], self.totals[Role.PROVIDER, of, job] + more, of)
        self._write(made)
        self.unvouched[job] = (of, made)

    @precondition(lambda self: self.unvouched)
    @rule(data=st.data())
    def receive_a_voucher(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(sorted(self.unvouched)))
        of, made = self.unvouched.pop(job)
        side = (Role.PROVIDER, of)
        step = made.receipt.total - self.totals[Role.PROVIDER, of, job]
        self.promised[side] = self.promised.get(side, 0) + step
        self.totals[Role.PROVIDER, of, job] = made.receipt.total
        self._write(s.received(job, made.receipt.step, self.promised[side], of))

    @precondition(lambda self: self._jobs(Role.CLIENT))
    @rule(data=st.data(), more=st.integers(0, 500))
    def vouch(self, data: st.DataObject, more: int) -> None:
        of, job = data.draw(st.sampled_from(self._jobs(Role.CLIENT)))
        side = (Role.CLIENT, of)
        self.steps[Role.CLIENT, job] += 1
        self.totals[Role.CLIENT, of, job] += more
        self.promised[side] = self.promised.get(side, 0) + more
        total = self.totals[Role.CLIENT, of, job]
        self._write(s.vouched(job, self.steps[Role.CLIENT, job], total, self.promised[side], of))

    @rule(role=st.sampled_from(Role), of=st.integers(0, CLIENTS - 1), steps=st.integers(0, 3), gone=st.booleans())
    def keep(self, role: Role, of: int, steps: int, gone: bool) -> None:
        """A job that ends at once, its content kept under some receipts, and perhaps shredded."""
        job = len(self.steps)
        self._write(s.opened(job, role, of), s.prompt_kept(job, role))
        for step in range(1, steps + 1):
            self._write(s.output_kept(job, step, role))
        self._write(s.closed(job, 0, role))
        self.steps[role, job] = steps
        if gone:
            self._write(s.shredded(job, role))
            self.history = [record for record in self.history if not self._keeps(record)]

    @rule(number=st.integers(0, 5))
    def commit_and_judge(self, number: int) -> None:
        self._write(s.commitment(number), s.verdict(number), s.verdict(number, 1))

    @staticmethod
    def _keeps(record: Record) -> bool:
        """Content may not be written again once it is shredded: it would be kept anew."""
        return type(record).__name__ in ("PromptKept", "OutputKept", "ContentShredded")

    @rule(of=st.integers(0, CLIENTS - 1), deposit=st.integers(0, 3000), block=st.integers(1, 20))
    def see_a_slot(self, of: int, deposit: int, block: int) -> None:
        self._write(s.slot(of, deposit, claimed=deposit // 3, block=block))

    @rule(amounts=st.lists(st.integers(1, 3000), max_size=CLIENTS))
    def settle(self, amounts: list[int]) -> None:
        self.settlements += 1
        self._write(s.sent(self.settlements, *amounts))

    @precondition(lambda self: self.settlements)
    @rule(data=st.data(), block=st.integers(1, 20))
    def the_chain_decides(self, data: st.DataObject, block: int) -> None:
        number = data.draw(st.integers(1, self.settlements))
        self._write(s.mined(number, block) if data.draw(st.booleans()) else s.dropped(number))

    @precondition(lambda self: any(not self._settles(record) for record in self.history))
    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """What was written may be written again: it changes nothing, or is refused (a slot seen is news)."""
        facts = [record for record in self.history if not self._settles(record)]
        self._write(data.draw(st.sampled_from(facts)))

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def contradict(self, data: st.DataObject) -> None:
        """A call that ends in a refusal leaves nothing of what came before it in the same call."""
        record = data.draw(st.sampled_from(self.history))
        for store in (self.memory, self.sql):
            try:
                self._run(store.write(s.opened(10_000), record, s.mined(10_000)))
            except StoreError:
                continue
            raise AssertionError("the end of an unknown settlement was kept")

    @staticmethod
    def _settles(record: Record) -> bool:
        return type(record).__name__.startswith(("Settlement", "SlotSeen"))

    @rule()
    def reopen(self) -> None:
        self._run(self.sql.close())
        self._run(self.sql.open())

    def _jobs(self, role: Role) -> list[tuple[int, int]]:
        return [(of, job) for (side, of, job) in self.totals if side is role]

    @invariant()
    def both_tell_the_same(self) -> None:
        if not self.memory.writes:
            return
        for role in Role:
            accounts = self._run(self.sql.accounts(role))
            assert accounts == self._run(self.memory.accounts(role))
            assert self._run(self.sql.jobs(role)) == self._run(self.memory.jobs(role))
            for account in accounts:
                of = account.key.client[1]
                jobs = [total for (side, client, _), total in self.totals.items() if (side, client) == (role, of)]
                assert account.owed == sum(jobs), "owed is the sum over the channel's jobs"
                assert account.vouched == self.promised.get((role, of), 0)
                assert account.vouched >= self.seen.get((role, of), 0), "what was vouched fell"
                self.seen[role, of] = account.vouched
        assert self._run(self.sql.inconsistencies()) == []
        assert self._run(self.sql.receipts()) == self._run(self.memory.receipts())
        assert self._run(self.sql.settlements()) == self._run(self.memory.settlements())
        for role, job in self.steps:
            assert self._run(self.sql.kept(role, s.job_id(job))) == self._run(self.memory.kept(role, s.job_id(job)))
            late = s.opened(job).accept.accepted_at
            assert self._run(self.sql.kept_before(role, late)) == self._run(self.memory.kept_before(role, late))
        for read in ("commitments", "verdicts"):
            ours, theirs = (self._run(getattr(store, read)()) for store in (self.sql, self.memory))
            assert [row.record for row in ours] == [row.record for row in theirs]


Histories.TestCase.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
TestHistories = Histories.TestCase
