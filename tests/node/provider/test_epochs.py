"""Commitments: one per epoch with jobs, the same after a crash, posted until a block holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

import node.provider.epochs as epochs_module
from incentives.audit_draw import case_key, lot_of
from node.ports import ChainError, ChainUnavailable, Mined
from node.provider.delivery import FOREVER_MS
from node.provider.epochs import COMMITMENT_JOURNALED, COMMITMENT_POSTED
from protocol import merkle
from protocol.dossier import unpack_entries
from protocol.errors import Refused
from protocol.messages import Commitment
from protocol.units import JobId, Verifiability
from tests.node.provider.desk import EPOCH_S, Desk
from tests.twins.engine_twin import profile


class Crash(BaseException):
    """The process is gone."""


@contextmanager
def dying_at(point: str) -> Iterator[None]:
    """`crash_point(point)` ends the process, once."""
    real = epochs_module.crash_point

    def passed(name: str) -> None:
        if name == point:
            raise Crash(name)

    epochs_module.crash_point = passed
    try:
        yield
    finally:
        epochs_module.crash_point = real


async def on_chain(desk: Desk, epoch: int) -> Any:
    return await desk.court.commitment(case_key(desk.wallet.address, desk.profile_id, epoch))


async def test_each_epoch_with_jobs_is_committed_once_and_no_other() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    assert await desk.court.profile_registered(desk.profile_id), "registered by whoever serves it first"
    first = desk.epoch()
    paid = await desk.serve(1)
    unpaid = await desk.serve(2, tokens=70, paid=False)
    desk.pass_epoch(3)
    later = await desk.serve(3)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    assert len(await desk.store.commitments()) == 2
    made = await on_chain(desk, first)
    entries = merkle.ordered([paid.entry, unpaid.entry])
    root = merkle.root(entries)
    assert (made.root, made.count, made.total, made.earlier) == (root.hash, 2, root.total, 0)
    record = (await desk.store.commitment(made.key)).record  # type: ignore[union-attr]
    assert list(unpack_entries(record.entries)) == entries
    assert lot_of(record.secret) == made.lot
    other = await on_chain(desk, first + 3)
    assert (other.root, other.earlier) == (merkle.root([later.entry]).hash, 2)
    writes = desk.store.writes
    await desk.epochs.commit_due()
    assert (desk.store.writes, desk.epochs.unposted, desk.epochs.posted) == (writes, 0, 2)


async def test_the_running_epoch_is_not_committed() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    await desk.serve(1)
    await desk.epochs.commit_due()
    assert await desk.store.commitments() == []


async def test_a_refused_commitment_holds_up_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of order, the Court would look for a forced error in another commitment than the one that holds it."""
    desk = await Desk.made()
    await desk.epochs.join()
    first, sent = desk.epoch(), []
    for job in (1, 2):
        await desk.serve(job)
        desk.pass_epoch()
    post = desk.court.post_commitment

    async def moody(commitment: Commitment, signature: bytes) -> Mined:
        sent.append(commitment.epoch)
        if len(sent) == 1:
            raise ChainError("not now")
        return await post(commitment, signature)

    monkeypatch.setattr(desk.court, "post_commitment", moody)
    with pytest.raises(ChainError, match="not now"):
        await desk.epochs.commit_due()
    assert sent == [first]
    await desk.epochs.commit_due()
    assert sent == [first, first, first + 1]


async def test_a_running_job_holds_its_epoch_back_and_those_after_it() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    job = JobId(b"\7" * 32)
    desk.running[job] = desk.clock.now_ms()
    desk.pass_epoch()
    await desk.serve(2)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    assert await on_chain(desk, first) is None
    del desk.running[job]
    await desk.epochs.commit_due()
    assert await on_chain(desk, first) is not None
    assert await on_chain(desk, first + 1) is not None


@pytest.mark.parametrize("point", [COMMITMENT_JOURNALED, COMMITMENT_POSTED])
async def test_a_crash_at_any_point_leaves_one_commitment_that_is_posted(point: str) -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    desk.pass_epoch()
    with dying_at(point), pytest.raises(Crash):
        await desk.epochs.commit_due()
    (row,) = await desk.store.commitments()
    desk.restart()
    await desk.epochs.join()
    await desk.epochs.commit_due()
    assert await desk.store.commitments() == [row], "no second secret, no second root"
    made = await on_chain(desk, first)
    assert (made.root, made.lot) == (row.record.commitment.root, row.record.commitment.lot)
    assert desk.epochs.unposted == 0
    assert await desk.store.get_value(desk.epochs._slot("unposted")) == b""


async def test_epochs_missed_while_the_node_was_down_are_committed_at_its_next_start() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    desk.restart()
    desk.pass_epoch(5)
    await desk.epochs.join()
    await desk.epochs.commit_due()
    assert await on_chain(desk, first) is not None


async def test_with_the_chain_away_what_is_made_is_kept_and_posted_later() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    desk.pass_epoch()
    desk.world.down = True
    with pytest.raises(ChainUnavailable):
        await desk.epochs.commit_due()
    assert desk.epochs.unposted == 1
    desk.world.down = False
    await desk.epochs.commit_due()
    assert await on_chain(desk, first) is not None and desk.epochs.unposted == 0


async def test_what_was_posted_is_noted_until_a_confirmed_block_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    desk.pass_epoch()
    seen = desk.court.commitment

    async def lagging(key: Any) -> None:
        return None

    monkeypatch.setattr(desk.court, "commitment", lagging)
    await desk.epochs.commit_due()
    assert (desk.epochs.posted, desk.epochs.unposted) == (1, 1)
    await desk.epochs.commit_due()
    assert desk.epochs.posted == 1, "it may only lag, and is not sent again at once"
    desk.world.blocks.pop()  # taken back by a reorganisation
    desk.world.mine(1, 61)
    await desk.epochs.commit_due()
    monkeypatch.setattr(desk.court, "commitment", seen)
    await desk.epochs.commit_due()
    assert (desk.epochs.posted, desk.epochs.unposted) == (2, 0)
    assert await on_chain(desk, first) is not None


async def test_a_profile_served_before_a_change_of_model_is_committed_too() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first, former = desk.epoch(), desk.profile_id
    await desk.serve(1)
    desk.engine.profile = profile(b"another")
    desk.restart()
    await desk.epochs.join()
    second = desk.epoch()
    await desk.serve(2)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    assert await desk.court.commitment(case_key(desk.wallet.address, former, first)) is not None
    assert await on_chain(desk, second) is not None and desk.profile_id != former


async def test_jobs_of_a_profile_that_the_court_does_not_know_are_left_out() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    await desk.serve(1, profile=profile(b"never registered"))
    desk.pass_epoch()
    await desk.epochs.commit_due()
    assert await desk.store.commitments() == []


async def test_a_job_without_a_receipt_stands_in_no_tree() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    case = await desk.serve(1)
    job = await desk.store.job(case.entry.job_id)
    assert job is not None
    bare = replace(job.request, client_nonce=b"\x09" * 32)
    opened = desk.store._jobs[next(iter(desk.store._jobs))].opened
    await desk.store.write(replace(opened, job_id=JobId(b"\x09" * 32), request=bare))
    desk.pass_epoch()
    await desk.epochs.commit_due()
    (row,) = await desk.store.commitments()
    assert [entry.job_id for entry in unpack_entries(row.record.entries)] == [case.entry.job_id]


# ------------------------------------------------------------------------------------------------- where none are made


@pytest.mark.parametrize("why", ["no court", "not replayable", "uncalibrated"])
async def test_without_a_court_or_a_replay_nothing_is_committed_and_it_is_said_once(
    why: str, caplog: pytest.LogCaptureFixture
) -> None:
    desk = await Desk.made()
    if why == "uncalibrated":
        desk.engine.profile = replace(desk.engine.profile, flag_ppm=1_000_000)
    verifiability = Verifiability.LOGPROB if why == "not replayable" else Verifiability.REPLAY
    desk.restart(verifiability, court=why != "no court")
    for _ in range(2):
        await desk.epochs.join()
    assert [record.levelname for record in caplog.records if "no commitments are made" in record.message] == ["WARNING"]
    await desk.serve(1)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    await desk.epochs.finish(1.0)
    assert await desk.store.commitments() == [] and not desk.epochs.active and desk.epochs.why_not
    assert desk.epochs.cut_ms(desk.clock.now_ms()) == FOREVER_MS


# -------------------------------------------------------------------------------------------------------- while serving


async def test_a_job_must_be_over_while_its_epoch_can_still_be_committed_in_time() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    now = desk.clock.now_ms()
    end = (desk.epoch() + 1) * EPOCH_S
    assert desk.epochs.cut_ms(now) == (end + desk.rules.commit_window * 3 // 4) * 1000


async def test_no_job_is_accepted_into_an_epoch_that_is_committed() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    before = desk.clock.now_ms()
    desk.epochs.check_open(before)
    desk.pass_epoch(2)
    await desk.epochs.commit_due()
    desk.epochs.check_open(desk.clock.now_ms())
    with pytest.raises(Refused, match="set back"):
        desk.epochs.check_open(before)


async def test_a_stop_waits_for_the_epoch_to_end_and_commits() -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    first = desk.epoch()
    await desk.serve(1)
    await desk.epochs.finish(EPOCH_S + 2.0)
    assert await on_chain(desk, first) is not None


async def test_a_stop_says_until_when_to_start_again_what_it_could_not_commit(caplog: pytest.LogCaptureFixture) -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    await desk.serve(1)
    desk.pass_epoch()
    desk.world.down = True
    await desk.epochs.finish(5.0)
    due = (desk.epoch() + 1) * EPOCH_S + desk.rules.commit_window
    assert str(due) in caplog.text


async def test_a_stop_does_not_wait_for_an_epoch_that_ends_too_late(caplog: pytest.LogCaptureFixture) -> None:
    desk = await Desk.made()
    await desk.epochs.join()
    await desk.serve(1)
    before = desk.clock.now_ms()
    await desk.epochs.finish(0.5)
    assert desk.clock.now_ms() == before, "no sleep"
    assert "start this node again before" in caplog.text and await desk.store.commitments() == []
