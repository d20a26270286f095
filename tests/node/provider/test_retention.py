"""Content goes when its time is over, and never while a committee may ask for it."""

from __future__ import annotations

from incentives.ledger import JobOpened, PromptKept, Role
from node.provider.cases import Cases
from node.provider.retention import Retention
from node.shredding import Shredder
from protocol.units import Digest, JobId
from tests.node.provider.desk import Desk
from tests.node.provider.test_decoys import draw

HOUR_S = 3600


class Over(Cases):
    """Cases that are over when the test says so."""

    over = False

    async def is_over(self, key: Digest) -> bool:
        return self.over


async def set_up(hours: int = 0) -> tuple[Desk, Over, Shredder]:
    desk = await Desk.made()
    await desk.epochs.join()
    cases = Over(desk.court, desk.chain, desk.store, desk.clock, appeals=False)
    retention = Retention(desk.court, desk.store, desk.epochs, cases, desk.clock)
    return desk, cases, Shredder(Role.PROVIDER, hours, desk.store, desk.clock, retention.may_go)


async def test_content_stays_until_the_case_about_it_is_over() -> None:
    desk, cases, shredder = await set_up()
    job_id = (await desk.serve(1)).entry.job_id
    desk.world.mine(1, 1)
    assert await shredder.shred_due() == 0, "its epoch is not over"
    desk.pass_epoch()
    assert await shredder.shred_due() == 0, "it is not committed to"
    await desk.epochs.commit_due()
    assert await shredder.shred_due() == 0, "the commitment is not drawn, and nobody is there to draw it for"
    await draw(desk)
    desk.world.mine(1, 31)
    assert await shredder.shred_due() == 0, "a newcomer's jobs are all drawn, and the case is open"
    cases.over = True
    assert await shredder.shred_due() == 0, "the chain was looked at a moment ago"
    desk.world.mine(1, 31)
    assert await shredder.shred_due() == 1
    assert await desk.store.kept(Role.PROVIDER, job_id) is None
    assert await desk.store.receipts(job_id=job_id), "its bills stay"
    assert await shredder.shred_due() == 0


async def test_a_job_that_the_beacon_did_not_draw_may_go_at_once() -> None:
    desk, _, shredder = await set_up()
    await desk.serve(1)
    desk.pass_epoch()
    await desk.epochs.commit_due()
    await draw(desk)
    made = (await desk.store.commitments())[0].record
    state = desk.world.head.state.court
    record = state["commitment", made.key].record
    old = type(record)(**{name: getattr(record, name) for name in record.__slots__} | {"earlier": 50})
    state["commitment", made.key] = type(state["commitment", made.key])(old, Digest(b"\0" * 32))
    assert await shredder.shred_due() == 1


async def test_the_hours_that_were_promised_count_first() -> None:
    desk, cases, shredder = await set_up(hours=2)
    await desk.serve(1)
    cases.over = True
    desk.pass_epoch()
    await desk.epochs.commit_due()
    desk.world.mine(1, HOUR_S)
    assert await shredder.shred_due() == 0
    desk.world.mine(1, HOUR_S)
    assert await shredder.shred_due() == 1


async def test_without_a_court_only_the_hours_count_and_a_running_job_keeps_its_own() -> None:
    desk, _, _ = await set_up()
    desk.restart(court=False)
    retention = Retention(None, desk.store, desk.epochs, None, desk.clock)
    shredder = Shredder(Role.PROVIDER, 1, desk.store, desk.clock, retention.may_go)
    case = await desk.serve(1)
    opened = desk.store._jobs[Role.PROVIDER, case.entry.job_id].opened
    running = JobId(b"\x09" * 32)
    await desk.store.write(
        JobOpened(
            Role.PROVIDER,
            running,
            opened.request,
            b"",
            opened.accept,
            b"",
            "twin",
            b"",
        ),
        PromptKept(Role.PROVIDER, running, b"\1" * 32, (1,)),
    )
    assert await shredder.shred_due() == 0
    desk.world.mine(1, HOUR_S + 1)
    assert await shredder.shred_due() == 1
    assert await desk.store.kept(Role.PROVIDER, running) is not None
