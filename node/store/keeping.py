"""Records of verification into rows and back: kept content, commitments, verdicts.

The same rules as in apply.py: a replay changes nothing, a contradiction is refused. A second commitment under one key,
or a second verdict in one round of a case, would be equivocation once it is signed, so it is never kept.
"""

from __future__ import annotations

import time
from typing import Any, Final

from sqlalchemy import bindparam, delete, insert, select
from sqlalchemy.engine import Connection

from incentives.ledger import CommitmentMade, ContentShredded, OutputKept, PromptKept, Role, VerdictMade
from node.ports import CommitmentRow, Kept, VerdictRow
from node.store import documents, sealed, tables
from node.store.rows import Found, name, one, refused
from protocol.messages import Accept, Commitment, Verdict
from protocol.units import Digest, JobId

PROMPT_STEP: Final = 0
"""The step under which a prompt is kept; receipts are counted from 1."""

_job: Final = tables.core(tables.Job)
_key: Final = tables.core(tables.ContentKey)
_content: Final = tables.core(tables.Content)
_commitment: Final = tables.core(tables.CommitmentMadeRow)
_verdict: Final = tables.core(tables.VerdictMadeRow)

_FIND_JOB: Final = (
    select(_job.c.id, _job.c.accept, _job.c.closed, _key.c.key)
    .outerjoin(_key, _key.c.job == _job.c.id)
    .where(_job.c.role == bindparam("role"), _job.c.job_id == bindparam("job_id"))
)
_FIND_CONTENT: Final = select(_content.c.sealed).where(
    _content.c.job == bindparam("job"), _content.c.step == bindparam("step")
)
_ALL_CONTENT: Final = (
    select(_content.c.step, _content.c.sealed).where(_content.c.job == bindparam("job")).order_by(_content.c.step)
)
_ADD_KEY: Final = insert(_key)
_ADD_CONTENT: Final = insert(_content)
_DROP_KEY: Final = delete(_key).where(_key.c.job == bindparam("of_job"))
_DROP_CONTENT: Final = delete(_content).where(_content.c.job == bindparam("of_job"))
_FIND_COMMITMENT: Final = select(_commitment).where(_commitment.c.key == bindparam("key"))
_ADD_COMMITMENT: Final = insert(_commitment)
_FIND_VERDICT: Final = select(_verdict).where(
    _verdict.c.case_id == bindparam("case_id"), _verdict.c.round == bindparam("round")
)
_ADD_VERDICT: Final = insert(_verdict)


def _now_ms() -> int:
    """When a row was written, by this machine: for people to read, nothing follows from it."""
    return time.time_ns() // 1_000_000


def _find(connection: Connection, what: str, role: Role, job_id: bytes) -> Found:
    job = one(connection, _FIND_JOB, role=role.value, job_id=job_id)
    if job is None:
        raise refused(f"{what} of {name(role, job_id)}", "no JobOpened was written for it")
    return job


def _keep(connection: Connection, what: str, job: Found, key: bytes, step: int, plaintext: bytes) -> None:
    known = one(connection, _FIND_CONTENT, job=job.id, step=step)
    if known is None:
        row = {"job": job.id, "step": step, "sealed": sealed.seal(key, plaintext)}
        connection.execute(_ADD_CONTENT, row)
    elif sealed.unseal(key, known.sealed) != plaintext:
        raise refused(what, "other content was kept under this step")


def prompt_kept(connection: Connection, record: PromptKept) -> None:
    """Make the job's key and keep its prompt under it."""
    what = f"PromptKept of {name(record.role, record.job_id)}"
    job = _find(connection, "PromptKept", record.role, record.job_id)
    key = job.key
    if key is None:
        key = sealed.new_key()
        opened = documents.decode(Accept, job.accept).accepted_at
        connection.execute(_ADD_KEY, {"job": job.id, "key": key, "opened_at_ms": opened})
    _keep(connection, what, job, key, PROMPT_STEP, sealed.pack_prompt(record.salt, record.prompt))


def output_kept(connection: Connection, record: OutputKept) -> None:
    """Keep what lies under a receipt, beside the prompt that it answers."""
    what = f"OutputKept of {name(record.role, record.job_id, record.step)}"
    job = _find(connection, "OutputKept", record.role, record.job_id)
    if job.key is None:
        raise refused(what, "no prompt is kept for the job, or its content was shredded")
    if record.step <= PROMPT_STEP:
        raise refused(what, "receipts are counted from 1")
    _keep(connection, what, job, job.key, record.step, sealed.pack_content(record.content))


def content_shredded(connection: Connection, record: ContentShredded) -> None:
    """Destroy the key, and the sealed rows with it. What the job's bills say stays."""
    job = _find(connection, "ContentShredded", record.role, record.job_id)
    if job.closed is None:
        raise refused(f"ContentShredded of {name(record.role, record.job_id)}", "the job is still running")
    connection.execute(_DROP_KEY, {"of_job": job.id})
    connection.execute(_DROP_CONTENT, {"of_job": job.id})


def commitment_made(connection: Connection, record: CommitmentMade) -> None:
    """One commitment per key, for ever."""
    facts = {
        "commitment": documents.encode(record.commitment),
        "entries": record.entries,
        "secret": record.secret,
        "decoy": record.decoy,
    }
    known = one(connection, _FIND_COMMITMENT, key=record.key)
    if known is None:
        connection.execute(_ADD_COMMITMENT, {**facts, "key": record.key, "made_at_ms": _now_ms()})
    elif any(getattr(known, field) != value for field, value in facts.items()):
        what = f"CommitmentMade 0x{record.key.hex()[:16]}"
        raise refused(what, "another commitment was made under this key; signing both would be equivocation")


def verdict_made(connection: Connection, record: VerdictMade) -> None:
    """One verdict per case and round, for ever."""
    verdict = record.verdict
    facts = {"verdict": documents.encode(verdict), "digest": record.digest, "findings": record.findings}
    known = one(connection, _FIND_VERDICT, case_id=verdict.case_id, round=verdict.round)
    if known is None:
        row = {**facts, "case_id": verdict.case_id, "round": verdict.round, "made_at_ms": _now_ms()}
        connection.execute(_ADD_VERDICT, row)
    elif any(getattr(known, field) != value for field, value in facts.items()):
        what = f"VerdictMade in case 0x{verdict.case_id.hex()[:16]} round {verdict.round}"
        raise refused(what, "another verdict was made in this round; submitting both would be equivocation")


# ------------------------------------------------------------------------------------------------------------ reading


def kept(connection: Connection, role: Role, job_id: bytes) -> Kept | None:
    """A job's content, or None when none is kept. Raises: StoreError when it does not open."""
    job = one(connection, _FIND_JOB, role=role.value, job_id=job_id)
    if job is None or job.key is None:
        return None
    rows = connection.execute(_ALL_CONTENT, {"job": job.id}).all()
    opened = [(row.step, sealed.unseal(job.key, row.sealed)) for row in rows]
    salt, prompt = sealed.unpack_prompt(next(data for step, data in opened if step == PROMPT_STEP))
    content = [item for step, data in opened if step != PROMPT_STEP for item in sealed.unpack_content(data)]
    return Kept(salt, prompt, tuple(content))


def kept_before(connection: Connection, role: Role, opened_before_ms: int, limit: int) -> list[JobId]:
    """Jobs opened earlier than that whose content is still kept, oldest first."""
    query = (
        select(_job.c.job_id)
        .join(_key, _key.c.job == _job.c.id)
        .where(_job.c.role == role.value, _key.c.opened_at_ms < opened_before_ms)
        .order_by(_key.c.opened_at_ms, _job.c.id)
        .limit(limit)
    )
    return [JobId(row.job_id) for row in connection.execute(query)]


def _commitment_row(row: Any) -> CommitmentRow:
    document = documents.decode(Commitment, row.commitment)
    record = CommitmentMade(Digest(row.key), document, row.entries, row.secret, JobId(row.decoy))
    return CommitmentRow(record, row.made_at_ms)


def commitment(connection: Connection, key: bytes) -> CommitmentRow | None:
    """One commitment."""
    row = one(connection, _FIND_COMMITMENT, key=key)
    return None if row is None else _commitment_row(row)


def commitments(connection: Connection, limit: int) -> list[CommitmentRow]:
    """Newest first."""
    query = select(_commitment).order_by(_commitment.c.id.desc()).limit(limit)
    return [_commitment_row(row) for row in connection.execute(query)]


def _verdict_row(row: Any) -> VerdictRow:
    document = documents.decode(Verdict, row.verdict)
    return VerdictRow(VerdictMade(document, Digest(row.digest), row.findings), row.made_at_ms)


def verdict(connection: Connection, case_id: bytes, round_: int) -> VerdictRow | None:
    """This node's verdict in one round of a case."""
    row = one(connection, _FIND_VERDICT, case_id=case_id, round=round_)
    return None if row is None else _verdict_row(row)


def verdicts(connection: Connection, limit: int) -> list[VerdictRow]:
    """Newest first."""
    query = select(_verdict).order_by(_verdict.c.id.desc()).limit(limit)
    return [_verdict_row(row) for row in connection.execute(query)]
