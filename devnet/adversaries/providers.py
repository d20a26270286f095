"""Providers that compute honestly and write dishonestly: counts, prices, receipts, offers.

Every false document here is signed with the provider's own key, so each is evidence against it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from devnet.adversaries.standing_in import stand_in
from node.ports import JobRow
from node.provider.audits import Audits
from node.provider.delivery import Delivery
from node.provider.epochs import Epochs
from protocol.eip712 import Domain, digest
from protocol.errors import Refused
from protocol.frames import OfferEnvelope, Receipt, RefusalCode
from protocol.merkle import Entry
from protocol.messages import Offer, Tariff, WorkReceipt
from protocol.metering import Usage
from protocol.offers import seal_offer
from protocol.packing import pack
from protocol.signing import Signer
from protocol.tariff import basis_of, cost_up
from protocol.units import Address, FinishReason, JobId, Wei
from protocol.work import Work

EXTRA_TOKENS: Final = 8
"""Tokens that `over-count` adds to every receipt. Unit: tokens."""

SURCHARGE_BPS: Final = 100
"""What `overcharge` adds to the tariff's price. Unit: basis points of the total."""

VICTIM: Final = "SQUAT_ON"
"""Environment variable: the wallet (hex) in whose name `squatter` offers; without it, one that nobody owns."""


class OverCounting(Work):
    """Receipts count EXTRA_TOKENS more than were delivered, and price them."""

    __slots__ = ()

    def receipt(self, finish: FinishReason, finished_at: int, vouched: Wei) -> tuple[Work, WorkReceipt]:
        """As the base, with tokens that nobody got."""
        work, honest = super().receipt(finish, finished_at, vouched)
        tokens = honest.completion_tokens + EXTRA_TOKENS
        usage = Usage(honest.prompt_tokens, honest.cached_tokens, tokens, honest.reasoning_tokens)
        cost = cost_up(self.tariff, usage, basis_of(self.request), self.timing(finished_at))
        return work, replace(
            honest,
            completion_tokens=tokens,
            completion_line=cost.completion_line,
            refund=cost.refund,
            total=cost.total,
        )


class Overcharging(Work):
    """Receipts ask one percent more than the tariff they name."""

    __slots__ = ()

    def receipt(self, finish: FinishReason, finished_at: int, vouched: Wei) -> tuple[Work, WorkReceipt]:
        """As the base, dearer."""
        work, honest = super().receipt(finish, finished_at, vouched)
        return work, replace(honest, total=honest.total + max(1, honest.total * SURCHARGE_BPS // 10_000))


class ForgettingCache(Work):
    """Says that it keeps a prompt, hits it the next time, and charges it as if it had been read again."""

    __slots__ = ()

    def hit(self, _: int, *, kept: bool) -> Work:
        """As the base, never cached."""
        return super().hit(0, kept=kept)


class Equivocating(Delivery):
    """Signs two receipts of one step: the client's, and a dearer one in case that is the one vouched for."""

    async def _send_receipt(self) -> None:
        await super()._send_receipt()
        receipt = self._unvouched
        if receipt is not None:
            other = replace(receipt, total=receipt.total + 1)
            signature = self._tools.signer.sign(self._tools.domain, other)
            await self._talk.send(Receipt(pack(other), signature))


class Omitting(Epochs):
    """Leaves every other job out of its commitments: what no root holds, no committee draws."""

    async def _entry(self, job: JobRow) -> Entry | None:
        entry = await super()._entry(job)
        return None if job.job_id[-1] % 2 else entry


class Withholding(Audits):
    """Shows its entries and no dossier: it would rather be away than be seen through."""

    async def _dossier(self, _: Address, __: Any, ___: JobId) -> bytes:
        raise Refused(RefusalCode.BUSY, "ask again")


def _account_as(work: type[Work]) -> None:
    stand_in("node.provider.server", "Work", work)


def over_count() -> None:
    """Have this process count too much."""
    _account_as(OverCounting)


def overcharge() -> None:
    """Have this process charge too much."""
    _account_as(Overcharging)


def false_cached() -> None:
    """Have this process charge hits as misses."""
    _account_as(ForgettingCache)


def equivocate() -> None:
    """Have this process sign twice."""
    stand_in("node.provider.server", "Delivery", Equivocating)


def omit() -> None:
    """Have this process commit to half of its jobs."""
    stand_in("node.provider.epochs", "Epochs", Omitting)


def withhold() -> None:
    """Have this process show no transcript."""
    stand_in("node.provider.audits", "Audits", Withholding)


def victim(environ: Mapping[str, str] = os.environ) -> Address:
    """Whom `squatter` pretends to be."""
    named = environ.get(VICTIM, "")
    return Address(bytes.fromhex(named.removeprefix("0x")) or hashlib.sha256(b"nobody").digest()[-20:])


def seal_for_another(
    domain: Domain, signer: Signer, offer: Offer, tariff: Tariff, _: bytes, **texts: Any
) -> OfferEnvelope:
    """An offer in the victim's name over a sheet in the victim's name, both signed with our own key."""
    theirs = replace(tariff, provider=victim())
    claimed = replace(offer, provider=victim(), tariff_hash=digest(domain, theirs))
    return seal_offer(domain, signer, claimed, theirs, signer.sign(domain, theirs), **texts)


def squat() -> None:
    """Have this process offer in somebody else's name."""
    stand_in("node.provider.offering", "seal_offer", seal_for_another)
