"""kill -9 at named points of real processes, one after another on one market: then nobody's books may miss anything.

Each start is armed with the next point, so that every recovery is itself under fire. Only the last ones are not.
tests/faults/test_crash_points.py has every point, on the twins.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import pytest

from devnet.processes import ProcessFailed
from incentives.ledger import Role
from node.ports import ReceiptRow
from node.store.store import SqlStore
from protocol.units import INCREMENT_TOKENS
from tests.scenarios import vocabulary as v
from tests.scenarios.processes import ProcessStage

PROVIDER_POINTS = (
    "store.JobOpened.before",
    "store.JobOpened.after",
    "store.ReceiptIssued.before:2",
    "store.ReceiptIssued.after:2",
    "provider.receipt.journaled:3",
    "provider.receipt.sent:2",
    "store.VoucherReceived.before:2",
    "store.VoucherReceived.after:2",
    "provider.voucher.journaled:2",
    "store.AckReceived.before",
    "store.AckReceived.after",
    "store.JobClosed.before",
    "store.SettlementSent.before",
    "store.SettlementSent.after",
    "settler.journaled",
    "settler.broadcast",
    "store.SettlementMined.before",
    "store.SettlementMined.after",
)

CLIENT_POINTS = (
    "store.JobOpened.after",
    "store.ReceiptVouched.before:2",
    "store.ReceiptVouched.after:2",
    "client.voucher.journaled:2",
    "store.AckSigned.before",
    "store.AckSigned.after",
    "client.ack.journaled",
)

LENGTH = 70
PATIENCE_S = 30.0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("who", "points"), [(v.PROVIDER, PROVIDER_POINTS), (v.CLIENT, CLIENT_POINTS)])
async def test_kill_at(tmp_path: Path, who: str, points: tuple[str, ...]) -> None:
    async with ProcessStage(tmp_path / "market", providers=1) as stage:
        readings = []
        await stage.act_ask(v.Ask(10, job="first"))  # opens the channel
        await stage.act_expect_finish(v.ExpectFinish(10, job="first"))
        for point in points:
            await _die_at(stage, who, point)
            readings += [job for job in stage.jobs.values() if job.jobs]
        await stage.restart(who)
        await stage.act_ask(v.Ask(LENGTH, job="last"))
        await stage.act_expect_finish(v.ExpectFinish(LENGTH, job="last"))
        audit = await stage.audit()
        assert audit.lost_wei == audit.credit_wei == 0, f"{audit} (in {stage.cluster.home})"
        seen = {bytes.fromhex(job.jobs[2:66]): len(job.words) for job in readings}
        await _losses(stage, seen)


async def _die_at(stage: ProcessStage, who: str, point: str) -> None:
    """Start `who` armed, give it a job, and see it die; it may die while it recovers from the death before."""
    node, start = stage.node(who), time.monotonic()
    node.kill()
    try:
        await stage.restart(who, TALLY_CRASH_AT=point)
    except (ProcessFailed, AssertionError):
        assert not node.running, f"{who} lives but did not start: {node.log_tail()}"
    else:
        name = f"at {point}"
        await stage.act_ask(v.Ask(LENGTH, job=name))
        while node.running:
            assert time.monotonic() - start < PATIENCE_S, f"{who} never passed {point} (in {stage.cluster.home})"
            await asyncio.sleep(0.02)
        task = stage.jobs[name].task
        assert task is not None
        await task
    assert node.exit_status == -signal.SIGKILL, node.log_tail()
    print(f"{who:9} {point:32} {time.monotonic() - start:5.2f} s")


async def _losses(stage: ProcessStage, seen: dict[bytes, int]) -> None:
    """Per job: what was read and not vouched for, and what either side counts more than the other."""
    sides = {}
    for side, node in ((Role.CLIENT, stage.clients[v.CLIENT]), (Role.PROVIDER, stage.providers[v.PROVIDER])):
        store = SqlStore(node.home / "journal.db")
        await store.open()
        try:
            sides[side] = _vouched(await store.receipts(role=side, limit=10_000))
            assert not await store.inconsistencies()
            assert not await store.jobs(side, open_only=True)
        finally:
            await store.close()
    for job, words in seen.items():
        ours, theirs = sides[Role.CLIENT].get(job, 0), sides[Role.PROVIDER].get(job, 0)
        assert 0 <= ours - theirs <= INCREMENT_TOKENS, f"{job.hex()}: {ours} vouched for, {theirs} held"
        assert words - ours <= INCREMENT_TOKENS, f"{job.hex()}: {words} read, {ours} vouched for"


def _vouched(rows: list[ReceiptRow]) -> dict[bytes, int]:
    """Job -> tokens of its last vouched receipt."""
    last: dict[bytes, int] = {}
    for row in rows:
        if row.voucher is not None:
            job = bytes(row.receipt.job_id)
            last[job] = max(last.get(job, 0), row.receipt.completion_tokens)
    return last
