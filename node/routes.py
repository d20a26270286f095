"""What a node answers at its control socket besides `status`: its journal and its view of the market, as JSON.

The same functions serve a command that opens the journal itself because no node runs, so a command does not care which
of the two it is. Amounts are decimal strings of wei, digests 0x-hexadecimal, times Unix milliseconds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from incentives.ledger import Role, VerdictMade
from node.ports import Chain, ChainError, JobRow, Kept, MarketEntry, Marketplace, ReceiptRow, Store
from node.reference import CardOf, References
from protocol.bundle import Bundle, Notch
from protocol.bundle_json import Node, decode, document_json, encode, signed_json
from protocol.eip712 import Domain, digest
from protocol.errors import TallyError
from protocol.messages import Profile, Tariff
from protocol.packing import packed_size, unpack
from protocol.signing import recover_digest
from protocol.units import ZERO_ADDRESS, Address, AuditOutcome, Digest, FinishReason, JobId

if TYPE_CHECKING:
    from node.client.claims import Claims

Route = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

STAKES_SHOWN: Final = 64
"""Providers whose stake a market answer looks up. Unit: providers, one RPC call each; more would make it slow."""


class NotInJournal(TallyError):
    """The journal does not hold the document asked for."""


def journal_routes(store: Store, domain: Domain) -> dict[str, Route]:
    """`receipts`, `bundle`, `job`, `facts`, `channels`, `jobs` (newest first), `job_bundle`, `tariff`, `kept` and
    `verdicts`."""

    async def receipts(params: dict[str, Any]) -> dict[str, Any]:
        role = Role(params["role"]) if params.get("role") else None
        rows = await store.receipts(role=role, final_only=bool(params.get("final", True)), limit=int(params["limit"]))
        models: dict[bytes, str] = {}
        for row in rows:
            job_id = bytes(row.receipt.job_id)
            if job_id not in models:
                job = await store.job(JobId(job_id))
                models[job_id] = job.model if job is not None else ""
        return {"receipts": [_receipt_json(row, models[bytes(row.receipt.job_id)]) for row in rows]}

    async def bundle(params: dict[str, Any]) -> dict[str, Any]:
        row = await _find(store, str(params["digest"]))
        job = await store.job(JobId(row.receipt.job_id))
        if job is None:
            raise NotInJournal(f"the journal has receipt {_hex(row.digest)} but not its job")
        made = await assemble(store, domain, job, row.role)
        return {"role": row.role.value, "model": job.model, "digest": _hex(row.digest), "bundle": encode(made)}

    async def job(params: dict[str, Any]) -> dict[str, Any]:
        found = await store.job(JobId(bytes.fromhex(str(params["job_id"]).removeprefix("0x"))))
        return {"job": None if found is None else await _job_json(store, found)}

    async def facts(_: dict[str, Any]) -> dict[str, Any]:
        return await journal_facts(store)

    async def channels(_: dict[str, Any]) -> dict[str, Any]:
        return {"channels": await channels_json(store)}

    async def jobs(params: dict[str, Any]) -> dict[str, Any]:
        rows = await store.jobs(Role(params["role"]), limit=int(params["limit"]))
        return {"jobs": [_hex(row.job_id) for row in rows]}

    async def job_bundle(params: dict[str, Any]) -> dict[str, Any]:
        found = await store.job(JobId(bytes.fromhex(str(params["job_id"]).removeprefix("0x"))))
        if found is None:
            raise NotInJournal(f"the journal has no job {params['job_id']}")
        return {"bundle": encode(await assemble(store, domain, found, Role(params["role"])))}

    async def tariff(params: dict[str, Any]) -> dict[str, Any]:
        found, signature = await _tariff(store, bytes.fromhex(str(params["hash"]).removeprefix("0x")))
        return {"tariff": None if found is None else signed_json(found, signature)}

    async def kept(params: dict[str, Any]) -> dict[str, Any]:
        job_id = JobId(bytes.fromhex(str(params["job_id"]).removeprefix("0x")))
        found = await store.kept(Role(params["role"]), job_id)
        return {"kept": None if found is None else _kept_json(found)}

    async def verdicts(params: dict[str, Any]) -> dict[str, Any]:
        digits = str(params["case"]).removeprefix("0x").lower()
        rows = [row.record for row in await store.verdicts(limit=int(params.get("limit", 1_000)))]
        found = [record for record in rows if record.verdict.case_id.hex().startswith(digits)]
        return {"verdicts": [_verdict_json(record) for record in reversed(found)]}

    return {
        "receipts": receipts,
        "bundle": bundle,
        "job": job,
        "facts": facts,
        "channels": channels,
        "jobs": jobs,
        "job_bundle": job_bundle,
        "tariff": tariff,
        "kept": kept,
        "verdicts": verdicts,
    }


def _kept_json(found: Kept) -> dict[str, Any]:
    content = [piece.hex() for piece in found.content]
    return {"salt": found.salt.hex(), "prompt": list(found.prompt), "content": content}


def kept_of(answer: dict[str, Any]) -> Kept | None:
    """The content of a `kept` answer; None when it is not kept here."""
    found = answer["kept"]
    if found is None:
        return None
    content = tuple(bytes.fromhex(piece) for piece in found["content"])
    return Kept(bytes.fromhex(found["salt"]), tuple(found["prompt"]), content)


def _verdict_json(record: VerdictMade) -> dict[str, Any]:
    verdict = record.verdict
    return {
        "case": _hex(verdict.case_id),
        "round": verdict.round,
        "outcome": AuditOutcome(verdict.outcome).name,
        "tokens": verdict.tokens,
        "flags": verdict.flags,
        "voids": verdict.voids,
        "digest": _hex(record.digest),
        "findings": json.loads(record.findings),
    }


def claim_routes(claims: Claims) -> dict[str, Route]:
    """`claim` {case}: have this home's jobs in a case compensated."""

    async def claim(params: dict[str, Any]) -> dict[str, Any]:
        done = await claims.claim(Digest(bytes.fromhex(str(params["case"]).removeprefix("0x"))))
        return {"case": str(params["case"]), "amount_wei": str(done.amount), "jobs": done.jobs, "why": done.why}

    return {"claim": claim}


class TariffNumbers(Protocol):
    """What a running provider does with sheets that its operator signs (provider/offering.py)."""

    async def claim(self, tariff: Tariff, least: int) -> Tariff: ...

    async def adopt(self, tariff: Tariff) -> None: ...


def tariff_routes(offering: TariffNumbers) -> dict[str, Route]:
    """`tariff_claim` and `tariff_adopt`, answered by a running provider."""

    async def tariff_claim(params: dict[str, Any]) -> dict[str, Any]:
        tariff = Node("tariff", params["tariff"]).document(Tariff)
        return {"tariff": document_json(await offering.claim(tariff, int(params["least"])))}

    async def tariff_adopt(params: dict[str, Any]) -> dict[str, Any]:
        await offering.adopt(Node("tariff", params["tariff"]).document(Tariff))
        return {}

    return {"tariff_claim": tariff_claim, "tariff_adopt": tariff_adopt}


def market_routes(marketplace: Marketplace, chain: Chain, card_of: CardOf | None = None) -> dict[str, Route]:
    """`market`, answered by a running client. `measure`: each offer with its `reference`; `text`: counted as well.

    `card_of`: how to have the card of a profile; without it offers stay unmeasured.
    """
    references = References(card_of)

    async def market(params: dict[str, Any]) -> dict[str, Any]:
        entries = [entry for entry in await marketplace.market() if params.get("model") in (None, entry.model)]
        offers = await offers_json(entries, chain)
        if params.get("measure"):
            await references.learn(entries)
            for entry, offer in zip(entries, offers, strict=True):
                offer["reference"] = await references.as_json(entry.profile, params.get("text"))
        return {"offers": offers}

    return {"market": market}


# ------------------------------------------------------------------------------------------------------------- journal


async def _find(store: Store, prefix: str) -> ReceiptRow:
    """The receipt whose digest begins so. Raises: NotInJournal, StoreError (several do)."""
    digits = prefix.removeprefix("0x").lower()
    try:
        # The store looks up whole bytes; a last odd digit is compared afterwards.
        wanted = bytes.fromhex(digits[: len(digits) // 2 * 2])
        row = await store.receipt(wanted) if 1 <= len(wanted) <= 32 else None
    except ValueError:
        row = None
    if row is None or not row.digest.hex().startswith(digits):
        raise NotInJournal(f"no receipt's digest begins with {prefix!r}")
    return row


async def assemble(store: Store, domain: Domain, job: JobRow, role: Role) -> Bundle:
    """All documents of one job as this journal holds them. Raises: StoreError."""
    tariff, tariff_signature = await _tariff(store, job.request.tariff_hash)
    notches = tuple(
        Notch(
            digest=row.digest,
            receipt=row.receipt,
            receipt_signature=row.receipt_signature,
            voucher=row.voucher,
            voucher_signature=row.voucher_signature,
            ack_signature=row.ack_signature,
            token_ids=row.token_ids,
        )
        for row in await store.receipts(role=role, job_id=job.job_id, limit=1 << 16)
    )
    # The client checked this signature against the offer's node key before it journaled it; the provider made it.
    node_key = recover_digest(digest(domain, job.accept), job.accept_signature) or ZERO_ADDRESS
    return Bundle(
        domain=domain,
        node_key=node_key,
        request=job.request,
        request_signature=job.request_signature,
        accept=job.accept,
        accept_signature=job.accept_signature,
        options=job.options,
        profile=await _profile(store, job.request.profile_id),
        tariff=tariff,
        tariff_signature=tariff_signature,
        notches=notches,
    )


async def _tariff(store: Store, tariff_hash: bytes) -> tuple[Tariff | None, bytes]:
    kept = await store.get_value(f"tariff/{tariff_hash.hex()}")
    size = packed_size(Tariff)
    if kept is None or len(kept) != size + 65:
        return None, b""
    return unpack(Tariff, kept[:size]), kept[size:]


async def _profile(store: Store, profile_id: bytes) -> Profile | None:
    kept = await store.get_value(f"profile/{profile_id.hex()}")
    return None if kept is None or len(kept) != packed_size(Profile) else unpack(Profile, kept)


def bundle_of(answer: dict[str, Any]) -> Bundle:
    """The bundle of a `bundle` answer. Raises: MalformedBundle."""
    return decode(str(answer["bundle"]))


async def _job_json(store: Store, job: JobRow) -> dict[str, Any]:
    rows = await store.receipts(role=job.role, job_id=job.job_id, limit=1 << 16)
    last = rows[-1] if rows else None
    return {
        "job_id": _hex(job.job_id),
        "role": job.role.value,
        "model": job.model,
        "provider": _hex(job.request.provider),
        "steps": job.steps,
        "owed_wei": str(job.owed),
        "closed": None if job.closed is None else job.closed.name.lower(),
        "detail": job.detail,
        "completion_tokens": last.receipt.completion_tokens if last is not None else 0,
        "receipt": _hex(last.digest) if last is not None else None,
    }


def _receipt_json(row: ReceiptRow, model: str) -> dict[str, Any]:
    receipt = row.receipt
    return {
        "digest": _hex(row.digest),
        "role": row.role.value,
        "model": model,
        "job_id": _hex(receipt.job_id),
        "step": receipt.step,
        "final": receipt.is_final,
        "at_ms": receipt.finished_at or receipt.first_token_at or receipt.received_at,
        "provider": _hex(receipt.provider),
        "client": _hex(receipt.client),
        "prompt_tokens": receipt.prompt_tokens,
        "cached_tokens": receipt.cached_tokens,
        "completion_tokens": receipt.completion_tokens,
        "finish": FinishReason(receipt.finish_reason).name.lower(),
        "total_wei": str(receipt.total),
        "signatures": {
            "receipt": bool(row.receipt_signature) or row.role is Role.PROVIDER,
            "voucher": row.voucher is not None and (bool(row.voucher_signature) or row.role is Role.CLIENT),
            "ack": bool(row.ack_signature) or (row.role is Role.CLIENT and receipt.is_final),
        },
    }


async def journal_facts(store: Store) -> dict[str, Any]:
    """What the journal knows without a node: open jobs, channels, money."""
    out: dict[str, Any] = {}
    for role in Role:
        accounts = [account for account in await store.accounts(role) if account.owed or account.vouched]
        if accounts:
            out[role.value] = {
                "channels": len(accounts),
                "open_jobs": len(await store.jobs(role, open_only=True)),
                "vouched_wei": str(sum(account.vouched for account in accounts)),
                "claimed_wei": str(sum(account.claimed for account in accounts)),
            }
    last = await store.receipts(final_only=True, limit=1)
    shown = ("digest", "role", "at_ms", "completion_tokens", "finish", "total_wei")
    out["last_receipt"] = {name: _receipt_json(last[0], "")[name] for name in shown} if last else None
    out["settlements_open"] = len(await store.settlements(state="sent"))
    return out


async def channels_json(store: Store) -> list[dict[str, Any]]:
    """Escrow channels as the journal last saw them. `role`: this home's side."""
    return [
        {
            "role": role.value,
            "provider": _hex(account.key.provider),
            "client": _hex(account.key.client),
            "deposit_wei": str(account.deposit),
            "vouched_wei": str(account.vouched),
            "claimed_wei": str(account.claimed),
            "exit_at": account.exit_at,
        }
        for role in Role
        for account in await store.accounts(role)
        if account.vouched or account.owed
    ]


# -------------------------------------------------------------------------------------------------------------- market


async def offers_json(entries: list[MarketEntry], chain: Chain) -> list[dict[str, Any]]:
    """Offers as JSON. `stake_wei` None: not known now."""
    wallets = list(dict.fromkeys(entry.provider for entry in entries))[:STAKES_SHOWN]
    stakes = dict(zip(wallets, await asyncio.gather(*(_stake(chain, wallet) for wallet in wallets)), strict=True))
    return [_offer_json(entry, stakes.get(entry.provider)) for entry in entries]


async def _stake(chain: Chain, wallet: Address) -> int | None:
    try:
        async with asyncio.timeout(3):
            record = await chain.provider(wallet)
    except (ChainError, TimeoutError):
        return None
    return None if record is None else record.stake


def _offer_json(entry: MarketEntry, stake: int | None) -> dict[str, Any]:
    tariff = entry.tariff
    return {
        "model": entry.model,
        "provider": _hex(entry.provider),
        "peer_id": entry.peer_id,
        "profile": _hex(entry.profile),
        "prompt_wei": str(tariff.prompt_price),
        "cached_wei": str(tariff.cached_price),
        "completion_wei": str(tariff.completion_price),
        "reasoning_wei": str(tariff.reasoning_price),
        "per_request_wei": str(tariff.per_request),
        "tariff": document_json(tariff),
        "base_bps": entry.base_bps,
        "verifiability": entry.verifiability.name.lower(),
        "tier_bps": {"flex": tariff.flex_bps, "standard": tariff.standard_bps, "priority": tariff.priority_bps},
        "slots": entry.slots,
        "load_bps": entry.load_bps,
        "max_context": entry.max_context,
        "max_output": entry.max_output,
        "region": entry.region,
        "stake_wei": None if stake is None else str(stake),
        "expires_at": entry.expires_at,
    }


def _hex(value: bytes) -> str:
    return "0x" + value.hex()
