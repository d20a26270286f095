"""What a provider's journal says it did in a period: the figures behind `tally provider economics`.

Served at the control socket of a provider alone, which only the owner of its home can open; never at the gateway's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from incentives.economics import Activity, union_ms
from incentives.ledger import Role
from node.ports import JobRow, ReceiptRow, Store
from protocol.units import Wei

MAX_JOBS: Final = 100_000
"""Most jobs looked through, the newest. Each takes about 5 KB of memory; the answer says when there were more."""


def books_routes(store: Store) -> dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
    """`activity` {since_ms, until_ms, slots}, answered from one journal."""

    async def answer(params: dict[str, Any]) -> dict[str, Any]:
        found, whole = await activity(store, *(int(params[name]) for name in ("since_ms", "until_ms", "slots")))
        return {"activity": {name: str(getattr(found, name)) for name in Activity.__dataclass_fields__}, "whole": whole}

    return {"activity": answer}


async def activity(store: Store, since_ms: int, until_ms: int, slots: int) -> tuple[Activity, bool]:
    """What was sold between two Unix milliseconds, and whether that is all: False when older jobs were not looked at.

    A job counts where it was accepted. The period begins with the first job of the journal when that is later, since
    nothing says whether the machine ran before. Raises: StoreError.
    """
    jobs = await store.jobs(Role.PROVIDER, limit=MAX_JOBS)
    whole = len(jobs) < MAX_JOBS or jobs[-1].opened_at_ms <= since_ms
    start = max(since_ms, min((job.opened_at_ms for job in jobs), default=since_ms))
    inside = [job for job in jobs if start <= job.opened_at_ms < until_ms]
    finals = await store.receipts(role=Role.PROVIDER, final_only=True, limit=MAX_JOBS)
    last = {bytes(row.receipt.job_id): row for row in finals}
    receipts = []
    for job in inside:
        row = last.get(bytes(job.job_id)) or await _last_of(store, job)
        if row is not None:
            receipts.append(row.receipt)
    spans = [(item.received_at, item.finished_at or item.first_token_at or item.received_at) for item in receipts]
    settled = await store.settlements(state="mined", limit=MAX_JOBS)
    period = max(0, until_ms - start)
    found = Activity(
        period_ms=period,
        busy_ms=union_ms(spans, start, start + period),
        slot_ms=sum(min(end, until_ms) - begin for begin, end in spans),
        slots=slots,
        jobs=len(inside),
        prompt_tokens=sum(item.prompt_tokens for item in receipts),
        cached_tokens=sum(item.cached_tokens for item in receipts),
        completion_tokens=sum(item.completion_tokens for item in receipts),
        ste_micro=sum(item.ste_micro for item in receipts),
        revenue=Wei(sum(job.owed for job in inside)),
        settled=Wei(sum(row.paid for row in settled)),
        fee=Wei(sum(row.fee for row in settled)),
        gas_wei=sum(row.gas_wei for row in settled),
    )
    return found, whole


async def _last_of(store: Store, job: JobRow) -> ReceiptRow | None:
    """The last receipt of a job that never had a final one."""
    rows = await store.receipts(role=Role.PROVIDER, job_id=job.job_id)
    return rows[-1] if rows else None
