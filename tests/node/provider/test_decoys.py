"""Forced errors: due by secret and beacon alone, planted beside real jobs, in papers like any other job's."""

from __future__ import annotations

import pytest

from incentives.audit_draw import case_key, is_forced
from incentives.ledger import Role
from protocol.dossier import examine
from protocol.units import ZERO_DIGEST, FinishReason
from tests.node.provider.desk import Desk
from tests.node.provider.papers import dossier_of


async def committed(desk: Desk, number: int) -> None:
    """A job, its epoch committed, and the next one under way."""
    await desk.serve(number)
    desk.pass_epoch()
    await desk.epochs.commit_due()


async def plant(desk: Desk) -> None:
    await desk.decoys.plant_if_due(desk.rules, desk.epoch(), desk.epochs._last_made)


async def draw(desk: Desk) -> None:
    """Fix the newest commitment's beacon. A committee would need validators: the twin's own draw is enough here."""
    made = (await desk.store.commitments())[0].record
    state = desk.world.head.state
    committed = state.court["commitment", made.key]
    record = committed.record
    state.court["commitment", made.key] = type(committed)(
        type(record)(**{name: getattr(record, name) for name in record.__slots__} | {"beacon": b"\x77" * 32}),
        committed.previous,
    )


async def test_an_error_is_planted_when_the_last_commitment_obliges_and_a_real_job_is_there() -> None:
    desk = await Desk.made(forced_bps=10_000)
    await desk.epochs.join()
    await committed(desk, 1)
    await plant(desk)
    assert desk.decoys.planted == 0, "no beacon yet"
    await draw(desk)
    await plant(desk)
    assert desk.decoys.planted == 0, "an epoch without a real job would show which one is planted"
    await desk.serve(2)
    for _ in range(3):
        await plant(desk)
    assert desk.decoys.planted == 1 and not desk.running
    job_id = await desk.decoys.planted_in(desk.epoch())
    job = await desk.store.job(job_id)
    assert job is not None and (job.closed, job.owed) == (FinishReason.LENGTH, 0)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    made = (await desk.store.commitments())[0].record
    assert made.decoy == job_id and made.commitment.count == 2
    last = (await desk.store.commitments())[1].record
    drawn = await desk.court.commitment(last.key)
    assert drawn is not None and is_forced(last.secret, drawn.beacon, 10_000)


async def test_a_planted_job_holds_in_every_document_and_errs_in_many_tokens() -> None:
    desk = await Desk.made(forced_bps=10_000)
    await desk.keep_tariff()
    await desk.epochs.join()
    await committed(desk, 1)
    await draw(desk)
    await desk.serve(2)
    await plant(desk)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    made = (await desk.store.commitments())[0].record
    dossier, entry = await dossier_of(desk, made, made.decoy)
    found = examine(dossier, entry, desk.world.domain, (desk.node_key.address,), desk.profile)
    engine = desk.engine
    honest = [engine.token(found.seed, len(dossier.prompt) + at) for at in range(len(found.rows))]
    wrong = sum(row.token_id != token for row, token in zip(found.rows, honest, strict=True))
    assert len(found.rows) == 64 and wrong == 21
    assert await desk.store.kept(Role.PROVIDER, made.decoy) is not None


@pytest.mark.parametrize("forced_bps", [0, 1])
async def test_nothing_is_planted_that_is_not_due(forced_bps: int) -> None:
    desk = await Desk.made(forced_bps=forced_bps)
    await desk.epochs.join()
    await committed(desk, 1)
    await draw(desk)
    await desk.serve(2)
    await plant(desk)
    assert desk.decoys.planted == 0
    assert await desk.decoys.planted_in(desk.epoch()) == ZERO_DIGEST


async def test_the_first_commitment_owes_no_error() -> None:
    desk = await Desk.made(forced_bps=10_000)
    await desk.epochs.join()
    await desk.serve(1)
    await plant(desk)
    assert desk.decoys.planted == 0


async def test_an_engine_that_is_full_plants_nothing_and_nothing_breaks(caplog: pytest.LogCaptureFixture) -> None:
    desk = await Desk.made(forced_bps=10_000)
    await desk.epochs.join()
    await committed(desk, 1)
    await draw(desk)
    await desk.serve(2)
    desk.engine.slots = 0
    await plant(desk)
    assert desk.decoys.planted == 0 and "could not be planted" in caplog.text
    desk.pass_epoch()
    await desk.epochs.commit_due()
    (newest, *_) = await desk.store.commitments()
    assert newest.record.decoy == ZERO_DIGEST and newest.record.commitment.count == 1
    assert newest.record.key == case_key(desk.wallet.address, desk.profile_id, desk.epoch() - 1)


async def test_no_error_is_planted_behind_an_epoch_that_is_still_to_be_committed() -> None:
    """The obligation excuses the very next commitment: an error in the one after it would cost the whole stake."""
    desk = await Desk.made(forced_bps=10_000)
    await desk.epochs.join()
    await committed(desk, 1)
    await draw(desk)
    long = await desk.serve(2)
    desk.running[long.entry.job_id] = desk.clock.now_ms()
    desk.pass_epoch()
    await desk.serve(3)
    await desk.epochs.commit_due()
    await desk.epochs.plant_due()
    assert desk.decoys.planted == 0, "the epoch before is held up by a running job, and comes first"
    del desk.running[long.entry.job_id]
    await desk.epochs.commit_due()
    await desk.epochs.plant_due()
    assert desk.decoys.planted == 0, "that commitment is the last one now, and has no beacon"
    await draw(desk)
    await desk.epochs.plant_due()
    assert desk.decoys.planted == 1


async def test_no_error_is_planted_while_a_commitment_is_not_on_chain() -> None:
    desk = await Desk.made(forced_bps=10_000)
    await desk.epochs.join()
    await committed(desk, 1)
    await draw(desk)
    await desk.serve(2)
    desk.epochs._unposted = [desk.profile_id]
    await desk.epochs.plant_due()
    assert desk.decoys.planted == 0
    desk.epochs._unposted = []
    await desk.epochs.plant_due()
    assert desk.decoys.planted == 1


async def test_no_error_slips_into_the_next_epoch(caplog: pytest.LogCaptureFixture) -> None:
    desk = await Desk.made(forced_bps=10_000)
    await desk.epochs.join()
    await committed(desk, 1)
    await draw(desk)
    await desk.serve(2)
    epoch = desk.epoch()
    desk.pass_epoch()
    await desk.serve(3)
    await desk.decoys.plant_if_due(desk.rules, epoch, desk.epochs._last_made)
    assert desk.decoys.planted == 0 and "ended at this moment" in caplog.text
