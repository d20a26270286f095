"""END, cancel, and death with failover on the engine and model that are shipped: the demo, as a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from devnet.demo import JOBS, Demo
from incentives.ledger import Role
from node.store.store import SqlStore
from protocol.units import FinishReason


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_end_cancel_and_failover_on_the_real_engine(tmp_path: Path) -> None:
    home = tmp_path / "devnet"
    result = await Demo(home, print, lambda done: None).run()
    assert not result.problems, f"{result.problems} (in {home})"
    assert result.conservation_ok and result.failover_text_identical
    assert (result.jobs_ok, result.jobs_cancelled, result.jobs_failed) == (JOBS - 1, 1, 0)
    assert result.lost_to_kill_wei == 0, "the killed provider's last voucher came with a later job"
    store = SqlStore(home / "gateway" / "journal.db")
    await store.open()
    try:
        ends = [job.closed for job in await store.jobs(Role.CLIENT)]
    finally:
        await store.close()
    assert FinishReason.CANCELLED in ends and FinishReason.ERROR in ends and None not in ends
