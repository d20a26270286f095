"""Compensation through a client's claims, on the twin and on the contracts: pro rata, to the payer, once."""

from __future__ import annotations

import pytest

from incentives.faults import Placed
from node.client.claims import Claims, Place, Places
from node.ports import ReceiptRow
from protocol import merkle
from protocol.eip712 import digest
from protocol.merkle import Entry
from protocol.messages import WorkReceipt
from protocol.units import WEI_PER_TALLY, AuditOutcome, Digest, JobId, Wei
from tests.node.chain.court_bench import STAKE, CourtBench, entries
from tests.node.chain.helpers import session, tariff
from tests.node.chain.test_court_faults import receipt
from tests.twins.chain_lab import CourtLab
from tests.twins.memory_store import MemoryStore

POOL = STAKE // 20

CLIENT = session(7)


class Journal(MemoryStore):
    """Settings as always, and these receipts."""

    def __init__(self, receipts: dict[Digest, WorkReceipt]) -> None:
        super().__init__()
        self._held = receipts

    async def receipt(self, digest_prefix: bytes) -> ReceiptRow | None:
        held = self._held.get(Digest(digest_prefix))
        if held is None:
            return None
        return ReceiptRow(None, Digest(digest_prefix), held, b"", b"", None, b"", ())  # type: ignore[arg-type]


@pytest.mark.parametrize("paid", [POOL // 10, 4 * POOL])
async def test_each_job_gets_its_share_once(court_lab: CourtLab, paid: int) -> None:
    """What it paid where the pool suffices, else its part of the pool."""
    bench = await CourtBench(court_lab).open(validators=3)
    wallet = await court_lab.account()
    node = await court_lab.node(wallet)
    await node.open_channel(bench.provider.address, CLIENT.secret, Wei(WEI_PER_TALLY))
    sheet, domain = tariff(bench.provider.address, 1, 1_000), bench.court.domain
    held, ours = {}, []
    for number in range(2):
        job = JobId(bytes([60 + number]) * 32)
        made = receipt(sheet, digest(domain, sheet), 1_000, job_id=job, client=CLIENT.address)
        held[digest(domain, made)] = made
        ours.append(Entry(job, digest(domain, made), Wei(paid)))
    jobs = tuple(merkle.ordered([*entries(3), *ours]))
    key = await bench.drawn(jobs=jobs)
    store = Journal(held)
    await store.open()
    claims = Claims(wallet.address, store, node, court_lab.court(node))
    assert "no job of this home" in (await claims.claim(key)).why
    places = [Place(Placed(entry, i, merkle.prove(jobs, i))) for i, entry in enumerate(jobs) if entry in ours]
    await claims.remember(key, Places(2, tuple(places)))
    assert await claims.remembered(key) == Places(2, tuple(places))
    assert "not carried out" in (await claims.claim(key)).why
    case = await bench.judge(key, AuditOutcome.IMPROBABLE)
    await bench.until(case.until)
    await bench.court.execute(key)
    before = await node.token_balance(wallet.address)
    done = await claims.claim(key)
    share = min(paid, POOL * paid // (2 * paid + 3_000))
    assert (done.amount, done.jobs, done.why) == (2 * share, 2, "")
    assert await node.token_balance(wallet.address) == before + 2 * share
    assert "paid before" in (await claims.claim(key)).why
    await claims.remember(key, Places(2, tuple(places)))  # a journal that lost the note of it
    again = await claims.claim(key)
    assert again.jobs == 0 and "compensate" in again.why
    assert await node.token_balance(wallet.address) == before + 2 * share
