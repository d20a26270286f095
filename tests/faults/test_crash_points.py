"""Kill either role at every crash point, before and after every journal write, and hold the books against each other.

The sentence to be kept: no acknowledged receipt or voucher is lost, nothing is billed twice, and nobody loses more than
one increment of the job. Here over all points on the twins; tests/faults/test_crash_processes.py has a choice of them
with kill -9 on real processes.
"""

from __future__ import annotations

import pytest

import node.client.attempt
import node.provider.provider  # noqa: F401 - declares its crash points
from incentives.ledger import Role
from node.crashpoints import CRASH_POINTS
from node.ports import JobRow, ReceiptRow
from protocol.units import INCREMENT_TOKENS
from tests.faults.crashing import Fuse, MortalMarket, roles_of
from tests.spine.test_endings import PROMPT_COST, TOKEN

LENGTH = 70
"""Output tokens of the interrupted job: two interim receipts and a final one."""

COUNTS = (1, 2, 3, 5)

UNREACHED = {
    (Role.CLIENT, name)
    for kind in ("ReceiptIssued", "VoucherReceived", "AckReceived", "SettlementSent", "SettlementMined")
    for name in (f"store.{kind}.before", f"store.{kind}.after")
} | {
    (Role.PROVIDER, name)
    for kind in ("ReceiptVouched", "AckSigned")
    for name in (f"store.{kind}.before", f"store.{kind}.after")
}
"""Records that only the other role writes."""

LATER = {(role, f"store.SettlementDropped.{side}") for role in Role for side in ("before", "after")}
"""Written at a restart only; see test_a_second_crash_during_recovery."""

ELSEWHERE = (
    "store.CommitmentMade.",
    "store.VerdictMade.",
    "store.ContentShredded.",
    "provider.commitment.",
    "provider.dossier.",
    "validator.",
)
"""Passed where there is a Court, or when content's time is over; this market has neither. Killed at in
tests/node/provider/test_epochs.py, the validator's tests, tests/spine/test_audit.py and tests/node/store."""

EVERY = [
    (role, point)
    for point in CRASH_POINTS
    for role in roles_of(point)
    if not point.startswith(("test.", *ELSEWHERE)) and (role, point) not in UNREACHED | LATER
]


@pytest.mark.slow
@pytest.mark.parametrize(("role", "point"), EVERY, ids=lambda value: str(value))
async def test_a_crash_loses_no_voucher_bills_nothing_twice_and_costs_an_increment_at_most(
    role: Role, point: str
) -> None:
    blown = 0
    for count in COUNTS:
        async with MortalMarket() as mortal:
            fuse = Fuse(role, point, count)
            mortal.arm(fuse)
            await mortal.until_dead(fuse, LENGTH)
            if not fuse.blown.is_set():
                break
            blown += 1
            await mortal.revive(role)
            assert await mortal.job(LENGTH), f"after a crash at {point}:{count} the next job works"
            await mortal._settled()
            await check(mortal, f"{role} {point}:{count}")
    assert blown, f"{role} never passes {point}"


@pytest.mark.parametrize("second", ["store.SettlementDropped.before", "store.SettlementDropped.after"])
async def test_a_second_crash_during_recovery(second: str) -> None:
    async with MortalMarket() as mortal:
        first = Fuse(Role.PROVIDER, "settler.journaled")
        mortal.arm(first)
        await mortal.until_dead(first, LENGTH)
        assert first.blown.is_set()
        store = mortal.stores[Role.PROVIDER]
        store.dead, store.fuse = False, Fuse(Role.PROVIDER, second)
        again = store.fuse
        with pytest.raises(BaseException, match="SettlementDropped"):
            await mortal._open_seller()
        assert again.blown.is_set()
        await mortal.market.sellers[0].transport.stop()
        await store.close()
        await mortal.market.network.kill(mortal.seller.transport.peer_id)
        await mortal.revive(Role.PROVIDER)
        assert await mortal.job(LENGTH)
        await mortal._settled()
        await check(mortal, second)


def billed(rows: list[ReceiptRow]) -> int:
    """Tokens of the last vouched receipt of a job."""
    return max((row.receipt.completion_tokens for row in rows if row.voucher is not None), default=0)


async def check(mortal: MortalMarket, where: str) -> None:
    """Both journals and the chain, once everything is settled."""
    client, provider = mortal.stores[Role.CLIENT], mortal.stores[Role.PROVIDER]
    (promised,) = [a for a in await client.accounts(Role.CLIENT) if a.key == mortal.key]
    (held,) = [a for a in await provider.accounts(Role.PROVIDER) if a.key == mortal.key]
    slot = await mortal.seller.chain.slot(mortal.key)
    assert slot is not None
    assert slot.claimed == held.vouched == promised.vouched, f"{where}: a voucher was lost"
    jobs = await client.jobs(Role.CLIENT)
    assert promised.vouched == promised.owed == sum(job.owed for job in jobs), f"{where}: billed twice"
    for job in jobs:
        await _check_job(mortal, job, where)
    for side, store in ((Role.CLIENT, client), (Role.PROVIDER, provider)):
        assert all(job.closed is not None for job in await store.jobs(side)), f"{where}: {side} has an open job"
    settled = [row for row in await provider.settlements() if row.state == "mined"]
    assert sum(row.paid for row in settled) == slot.claimed, f"{where}: the journal misses a settlement"


async def _check_job(mortal: MortalMarket, job: JobRow, where: str) -> None:
    ours = await mortal.stores[Role.CLIENT].receipts(role=Role.CLIENT, job_id=job.job_id)
    theirs = await mortal.stores[Role.PROVIDER].receipts(role=Role.PROVIDER, job_id=job.job_id)
    tokens, seen = billed(ours), mortal.seen.get(job.job_id, 0)
    assert job.owed == (PROMPT_COST + tokens * TOKEN if tokens else 0), f"{where}: not the tariff's cost"
    assert tokens <= max(seen, tokens if job.job_id not in mortal.seen else 0), f"{where}: paid for unseen tokens"
    assert seen - tokens <= INCREMENT_TOKENS, f"{where}: the provider lost more than an increment"
    assert abs(billed(theirs) - tokens) <= INCREMENT_TOKENS, f"{where}: the sticks differ by more than an increment"
    digests = {row.receipt.step: row.digest for row in theirs}
    assert all(digests[row.receipt.step] == row.digest for row in ours), f"{where}: two receipts of one step"
