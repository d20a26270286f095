"""Conservation, checked to the wei: what the client promised, the providers hold, and the chain paid must agree.

Reads the journals of stopped nodes and the contracts; nothing here is told by the nodes themselves while they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from incentives.ledger import ChannelKey, Role
from node.chain.chain import Web3Chain
from node.ports import SettlementRow, Store
from node.store.store import SqlStore
from protocol.units import Address, Wei

EVERYTHING = 1_000_000
"""Row limit of reads that must see all rows; a devnet has thousands."""


@dataclass(frozen=True, slots=True)
class Party:
    """One line of the table. Amounts in wei of TALLY, `gas_wei` in wei of the chain's coin."""

    name: str
    role: str
    tokens: int
    earned: int
    paid: int
    gas: int
    gas_wei: int


@dataclass(slots=True)
class Audit:
    """The figures of one run, and every sum that did not come out (`broken`, empty when conservation holds).

    `credit_wei`: vouched beyond what is owed, by refunds that came with a final receipt; the next job uses it up.
    """

    settled_wei: int = 0
    paid_wei: int = 0
    protocol_fee_wei: int = 0
    gas: int = 0
    pairs: int = 0
    receipts_signed: int = 0
    receipts_acknowledged: int = 0
    lost_wei: int = 0
    credit_wei: int = 0
    jobs_closed: int = 0
    jobs_open: int = 0
    parties: list[Party] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def check(self, what: str, left: int, right: int) -> None:
        """Keep the sentence when the two sides differ."""
        if left != right:
            self.broken.append(f"{what}: {left} is not {right} (difference {left - right} wei)")


async def audit_market(
    chain: Web3Chain, providers: Sequence[tuple[str, Path, Address]], clients: Sequence[tuple[str, Path]]
) -> Audit:
    """Compare the books of all clients and providers with the chain. All nodes must be stopped.

    `providers`: name, home, wallet. `clients`: name, home. A voucher that a kill -9 took before its provider had it on
    disk is the one sum that may differ: it is counted in `lost_wei`, the provider's loss of at most one increment for
    each such kill, until the next job on the channel makes it good. Raises: StoreError, ChainError.
    """
    audit = Audit()
    promised: dict[ChannelKey, Wei] = {}
    for client_name, home in clients:
        promised |= await _audit_client(audit, client_name, home)
    escrow = 0
    for key in promised:
        slot = await chain.slot(key)
        escrow += slot.deposit - slot.claimed if slot else 0
    for name, home, wallet in providers:
        escrow += await _audit_provider(audit, chain, name, home, wallet, promised)
    escrow += audit.protocol_fee_wei
    held = await chain.token_balance(chain.domain.verifying_contract)
    audit.check("TALLY held by the escrow against deposits, earnings and fees", held, escrow)
    audit.check("settled and lost to kills against promised", audit.settled_wei + audit.lost_wei, audit.paid_wei)
    return audit


async def _audit_client(audit: Audit, name: str, home: Path) -> dict[ChannelKey, Wei]:
    """Add one client's books to the audit; returns what it promised on each channel."""
    store = SqlStore(home / "journal.db")
    await store.open()
    try:
        accounts = await store.accounts(Role.CLIENT)
        jobs = await store.jobs(Role.CLIENT, limit=EVERYTHING)
        tokens = await _tokens_paid(store, Role.CLIENT)
    finally:
        await store.close()
    paid = sum(account.vouched for account in accounts)
    credit = sum(account.vouched - account.owed for account in accounts)
    open_jobs = sum(job.closed is None for job in jobs)
    audit.check(f"{name}: promises less credit against its jobs' totals", paid - credit, sum(job.owed for job in jobs))
    audit.check(f"{name}: jobs still open", open_jobs, 0)
    if any(account.vouched < account.owed for account in accounts):
        audit.broken.append(f"{name} owes more than it promised")
    audit.paid_wei += paid
    audit.credit_wei += credit
    audit.jobs_closed += len(jobs) - open_jobs
    audit.jobs_open += open_jobs
    audit.parties.append(Party(name, "client", tokens, 0, paid, 0, 0))
    return {account.key: account.vouched for account in accounts}


async def _audit_provider(
    audit: Audit, chain: Web3Chain, name: str, home: Path, wallet: Address, promised: Mapping[ChannelKey, Wei]
) -> Wei:
    """Add one provider's books to the audit; returns what it earned and has not collected."""
    store = SqlStore(home / "journal.db")
    await store.open()
    try:
        receipts = await store.receipts(role=Role.PROVIDER, limit=EVERYTHING)
        settlements = await store.settlements(limit=EVERYTHING)
        jobs = await store.jobs(Role.PROVIDER, limit=EVERYTHING)
        tokens = await _tokens_paid(store, Role.PROVIDER)
        held = {account.key.client: account.vouched for account in await store.accounts(Role.PROVIDER)}
    finally:
        await store.close()
    for session, vouched in held.items():
        slot = await chain.slot(ChannelKey(wallet, session))
        audit.check(f"{name}: claimed against the highest voucher it holds", slot.claimed if slot else 0, vouched)
    for key, wei in promised.items():
        if key.provider == wallet:
            audit.lost_wei += wei - held.get(key.client, 0)
    mined = [row for row in settlements if row.state == "mined"]
    paid, fee, gas = _sums(mined)
    earned = await chain.earned(wallet)
    audit.check(f"{name}: earned on chain against settled less fee", earned, paid - fee)
    audit.check(f"{name}: jobs still open", sum(job.closed is None for job in jobs), 0)
    audit.settled_wei += paid
    audit.protocol_fee_wei += fee
    audit.gas += gas
    audit.pairs += sum(len(row.vouchers) for row in mined)
    audit.receipts_signed += len(receipts)
    audit.receipts_acknowledged += sum(row.voucher is not None or bool(row.ack_signature) for row in receipts)
    audit.parties.append(Party(name, "provider", tokens, earned, 0, gas, sum(row.gas_wei for row in mined)))
    return earned


def _sums(mined: Sequence[SettlementRow]) -> tuple[int, int, int]:
    return sum(row.paid for row in mined), sum(row.fee for row in mined), sum(row.gas for row in mined)


async def _tokens_paid(store: Store, role: Role) -> int:
    """Output tokens of each job's last acknowledged receipt."""
    last: dict[bytes, int] = {}
    for row in await store.receipts(role=role, limit=EVERYTHING):
        if row.voucher is not None or row.ack_signature:
            job = row.receipt.job_id
            last[job] = max(last.get(job, 0), row.receipt.completion_tokens)
    return sum(last.values())
