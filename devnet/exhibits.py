"""The evidence behind a verdict, as a person can look at it: which tokens, in which words, how far off they are.

The numbers are a validator's own, from its journal; the words around them are the client's, who kept what it bought.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from incentives.ledger import Role
from incentives.verdicts import BEYOND, TokenMark, findings_of
from node.ports import Store
from node.store.store import SqlStore
from protocol.dossier import read_leaf
from protocol.units import Digest, JobId

BEFORE = 6
"""Tokens of the text before a flagged one that are shown with it: enough to see where one is."""

_SCALE = 1_000_000

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A flagged token. `position`: in the output. `margin`: logits by which a better token was passed over; None for a
    token that the sold model could not have drawn at all.

    `logprob`: nats, `projection`: relative, between what was recorded and what the model says. `before`: the text that
    leads up to it, "" when nobody kept it.
    """

    job: str
    position: int
    before: str
    text: str
    margin: float | None
    logprob: float
    projection: float


async def exhibits(
    journals: Sequence[Path], client: Path, case_id: Digest, decode: Decode, limit: int
) -> list[Exhibit]:
    """The worst tokens by the first of `journals` (of validators, stopped) that has a verdict with any on this case.

    `client`: the journal of who bought the work, stopped too. Raises: StoreError.
    """
    for journal in journals:
        marks = await _marks(journal, case_id)
        if marks:
            break
    else:
        return []
    worst = sorted(marks, key=lambda mark: _badness(mark[1]), reverse=True)[:limit]
    store = SqlStore(client)
    await store.open()
    try:
        return [await _exhibit(store, job_id, mark, decode) for job_id, mark in worst]
    finally:
        await store.close()


def _badness(mark: TokenMark) -> tuple[int, int, int]:
    return mark.margin_milli, mark.projection_micro, mark.logprob_micro


async def _marks(journal: Path, case_id: Digest) -> list[tuple[JobId, TokenMark]]:
    store = SqlStore(journal)
    await store.open()
    try:
        rows = [row.record for row in await store.verdicts() if row.record.verdict.case_id == case_id]
    finally:
        await store.close()
    first = rows[-1:]  # of its rounds: the numbers are the same in each
    return [(item.job_id, mark) for row in first for item in findings_of(row.findings) for mark in item.marks]


async def _exhibit(store: Store, job_id: JobId, mark: TokenMark, decode: Decode) -> Exhibit:
    kept = await store.kept(Role.CLIENT, job_id)
    tokens: list[int] = []
    for data in kept.content if kept else ():
        tokens += read_leaf(data, routed=False).token_ids
    return Exhibit(
        "0x" + job_id.hex(),
        mark.index,
        decode(tokens[max(0, mark.index - BEFORE) : mark.index]) if tokens else "",
        decode([mark.token_id]),
        None if mark.margin_milli == BEYOND else mark.margin_milli / 1000,
        mark.logprob_micro / _SCALE,
        mark.projection_micro / _SCALE,
    )
