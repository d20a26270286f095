"""The journal counted again from its facts: what `tally doctor` and an idle node compare the derived rows with.

Invariants, each with the text it is reported by:
  S1  a job owes the total of its last acknowledged receipt;
  S2  a channel owes the sum of what its jobs owe;
  S3  a channel's vouched amount is its highest voucher, and the signature is that voucher's;
  S4  every row points at rows that exist.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.engine import Connection

from node.store import tables

_channel: Final = tables.core(tables.Channel)
_job: Final = tables.core(tables.Job)
_receipt: Final = tables.core(tables.Receipt)
_voucher: Final = tables.core(tables.VoucherRow)


def inconsistencies(connection: Connection) -> list[str]:
    """What does not add up, one line each; empty when all is well. Reads every job and voucher once."""
    return [*_jobs(connection), *_channels(connection), *_references(connection)]


def _jobs(connection: Connection) -> list[str]:
    acknowledged = (_receipt.c.job == _job.c.id) & (_receipt.c.step == _job.c.acked_step)
    query = select(_job.c.role, _job.c.job_id, _job.c.owed, _receipt.c.total).outerjoin(_receipt, acknowledged)
    return [
        f"S1: {row.role} job 0x{row.job_id.hex()} owes {row.owed} wei, its receipts say {row.total or 0} wei"
        for row in connection.execute(query)
        if row.owed != (row.total or 0)
    ]


def _channels(connection: Connection) -> list[str]:
    owed: dict[int, int] = defaultdict(int)
    for job in connection.execute(select(_job.c.channel, _job.c.owed)):
        owed[job.channel] += job.owed
    best: dict[int, Any] = {}
    vouchers = (
        select(_job.c.channel, _voucher.c.cumulative, _voucher.c.signature)
        .join(_receipt, _receipt.c.id == _voucher.c.receipt)
        .join(_job, _job.c.id == _receipt.c.job)
        .order_by(_voucher.c.cumulative)
    )
    for voucher in connection.execute(vouchers):
        best[voucher.channel] = voucher
    out: list[str] = []
    for channel in connection.execute(select(_channel)):
        name = f"{channel.role} channel 0x{channel.provider.hex()} / 0x{channel.client.hex()}"
        if channel.owed != owed[channel.id]:
            out.append(f"S2: {name} owes {channel.owed} wei, its jobs say {owed[channel.id]} wei")
        highest = best.get(channel.id)
        amount, signature = (highest.cumulative, highest.signature) if highest is not None else (0, b"")
        if channel.vouched != amount:
            out.append(f"S3: {name} has {channel.vouched} wei vouched, its vouchers say {amount} wei")
        elif amount and channel.voucher_signature != signature:
            out.append(f"S3: {name} holds another signature than its highest voucher")
    return out


def _references(connection: Connection) -> list[str]:
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    return [f"S4: row {row[1]} of {row[0]} points at a row of {row[2]} that does not exist" for row in broken]
