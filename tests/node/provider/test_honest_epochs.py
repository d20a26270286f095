"""What an honest provider goes through between an epoch's end and its commitment, without ever owing one."""

from __future__ import annotations

from typing import Any

import pytest

from incentives.audit_draw import case_key
from incentives.fairness import entry_of
from incentives.faults import Fault, Proof, SignedReceipt, SignedTariff
from incentives.ledger import Role
from node.chain.court import FaultKind, encode_proof
from node.chain.errors import ContractReverted
from node.ports import ChainError, ChainUnavailable
from protocol.dossier import unpack_entries
from protocol.errors import Refused
from tests.node.provider.desk import EPOCH_S, Desk
from tests.protocol.dossiers import Case
from tests.twins.engine_twin import profile


async def committed(desk: Desk, epoch: int) -> Any:
    return await desk.court.commitment(case_key(desk.wallet.address, desk.profile_id, epoch))


async def test_jobs_served_before_the_chain_first_answered_are_committed() -> None:
    """A provider that was registered before serves on without its RPC; what it serves then is owed as well."""
    desk = await Desk.made()
    desk.chain.down = True
    with pytest.raises(ChainUnavailable):
        await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    desk.pass_epoch(2)
    desk.chain.down = False
    await desk.epochs.join()
    await desk.epochs.commit_due()
    assert await committed(desk, first) is not None


async def test_a_profile_that_somebody_else_registers_later_is_committed_from_then_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A refused registration (no gas, say) is no reason to owe commitments for ever."""
    desk = await Desk.made()

    async def refused(profile: object) -> None:
        raise ChainError("the account has no gas for it")

    monkeypatch.setattr(desk.court, "register_profile", refused)
    await desk.epochs.join()
    assert desk.epochs.why_not and not desk.epochs.active
    monkeypatch.undo()
    await desk.court.register_profile(desk.profile)
    desk.pass_epoch()
    first = desk.epoch()
    await desk.serve(1)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    assert await committed(desk, first) is not None and desk.epochs.active


async def test_an_rpc_that_is_away_over_a_whole_window_is_made_up_for_before_anybody_proves_it() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    desk.chain.down = True
    desk.world.mine(1, desk.rules.commit_window + 2 * EPOCH_S)
    with pytest.raises(ChainUnavailable):
        await desk.epochs.commit_due()
    desk.chain.down = False
    await desk.epochs.commit_due()
    assert await committed(desk, first) is not None, "late is better than never: nothing can be proved any more"


async def test_a_second_node_on_one_wallet_is_noticed_and_neither_sells_on(caplog: pytest.LogCaptureFixture) -> None:
    """Its jobs stand in no commitment; each new one would cost half of the stake."""
    desk, other = await Desk.made(), await Desk.made()
    other.world = desk.world
    other.__post_init__()
    other.restart()
    await desk.epochs.join()
    await other.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    await other.serve(2)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    await other.epochs.commit_due()
    assert await committed(desk, first) is not None and not desk.epochs.conflict
    assert "another commitment" in other.epochs.conflict
    assert [record.levelname for record in caplog.records if "one node per wallet" in record.message] == ["ERROR"]
    with pytest.raises(Refused, match="another node"):
        other.epochs.check_open(other.clock.now_ms())
    desk.epochs.check_open(desk.clock.now_ms())


async def test_a_commitment_that_was_mined_before_a_crash_is_no_conflict() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    await desk.serve(1)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    (row,) = await desk.store.commitments()
    await desk.store.put_value(desk.epochs._slot("unposted"), row.record.key)
    desk.restart()
    await desk.epochs.join()
    await desk.epochs.commit_due()
    assert not desk.epochs.conflict and desk.epochs.unposted == 0


@pytest.mark.parametrize("offset_ms", [-1, 0, 1, EPOCH_S * 1000 - 1])
async def test_a_job_at_an_epochs_edge_stands_in_the_epoch_of_its_receipt(offset_ms: int) -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    desk.pass_epoch(2)
    edge = desk.epoch() * EPOCH_S * 1000
    case = await desk.serve(1, received_ms=edge + offset_ms)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    (row,) = await desk.store.commitments()
    assert row.record.commitment.epoch == (edge + offset_ms) // (EPOCH_S * 1000)
    assert case.receipts[-1].received_at // 1000 // EPOCH_S == row.record.commitment.epoch


async def test_no_honest_epoch_lets_anybody_prove_a_missing_job_or_an_owed_commitment() -> None:
    """Every receipt that was ever issued, interim ones and unpaid ones too, against the Court's own judge."""
    desk = await Desk.made()
    await desk.epochs.join()
    cases = []
    for number in range(12):
        cases.append(await desk.serve(number, tokens=10 + 7 * number, paid=number % 3 > 0))
        desk.pass_epoch(number % 2)
    desk.engine.profile = profile(b"another")
    desk.restart()
    await desk.epochs.join()
    cases.append(await desk.serve(99))
    desk.pass_epoch()
    await desk.epochs.commit_due()
    desk.world.mine(1, desk.rules.commit_window + 10 * EPOCH_S)
    for case in cases:
        for receipt in case.receipts:
            for kind in (FaultKind.UNCOMMITTED, FaultKind.PRICE):
                assert not await proves(desk, kind, case, receipt), (kind, receipt.step)
    trees = [unpack_entries(row.record.entries) for row in await desk.store.commitments()]
    held = {entry.job_id for entries in trees for entry in entries}
    assert held == {case.entry.job_id for case in cases}
    for job in await desk.store.jobs(Role.PROVIDER):
        rows = await desk.store.receipts(role=Role.PROVIDER, job_id=job.job_id)
        entry = entry_of((row.digest, row.receipt, row.voucher is not None) for row in rows)
        assert any(entry in entries for entries in trees)


async def proves(desk: Desk, kind: FaultKind, case: Case, receipt: Any) -> bool:
    """Whether the Court takes a proof of this kind from the receipt."""
    fault = Fault.UNCOMMITTED if kind is FaultKind.UNCOMMITTED else Fault.OVERCHARGE
    proof = Proof(
        desk.world.domain,
        desk.node_key.address,
        fault,
        (SignedTariff(case.dossier.tariff, case.dossier.tariff_signature),),
        (SignedReceipt(receipt, desk.node_key.sign(desk.world.domain, receipt)),),
        epoch_s=EPOCH_S,
    )
    try:
        await desk.court.prove(*encode_proof(proof))
    except ContractReverted:
        return False
    return True


async def test_the_judge_would_see_an_epoch_that_was_left_alone() -> None:
    """Else the test before this one could not fail."""
    desk = await Desk.made()
    await desk.epochs.join()
    case = await desk.serve(1)
    desk.world.mine(1, desk.rules.commit_window + 10 * EPOCH_S)
    assert await proves(desk, FaultKind.UNCOMMITTED, case, case.receipts[-1])
