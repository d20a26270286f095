"""Clients that take and do not pay. Each is a gateway whose attempts misbehave after the provider accepted."""

from __future__ import annotations

from typing import Final

from devnet.adversaries.standing_in import stand_in
from incentives.ledger import ChannelKey
from node.client.attempt import Attempt, Parent
from node.ports import JobPaid
from protocol.frames import VoucherFrame
from protocol.messages import Voucher, WorkReceipt
from protocol.packing import pack
from protocol.units import JobId, Wei

BEYOND_BPS: Final = 20_000
"""What `overdraws` promises, of its deposit. Unit: basis points."""


class StopsVouchers(Attempt):
    """Reads the tokens of an increment and never vouches for it: one increment for nothing, per provider."""

    async def _on_receipt(self, receipt: WorkReceipt, signature: bytes) -> JobPaid:
        await self._check(receipt, signature, final=False)
        return JobPaid(self.total)

    async def _on_end(self, receipt: WorkReceipt, signature: bytes) -> JobPaid:
        return await self._on_receipt(receipt, signature)


class Replays(Attempt):
    """Vouches for the first increment and answers every later receipt with that same voucher."""

    _first: VoucherFrame | None = None

    async def _on_receipt(self, receipt: WorkReceipt, signature: bytes) -> JobPaid:
        if self._first is None:
            self._first, _ = await self._vouch(receipt, signature, final=False)
            await self.talk.send(self._first)
            return JobPaid(Wei(receipt.total))
        await self._check(receipt, signature, final=False)
        await self.talk.send(VoucherFrame(receipt.step, self._first.voucher, self._first.signature))
        return JobPaid(self.total)


class Overdraws(Attempt):
    """Promises twice what its channel holds: worthless paper for real tokens."""

    async def _on_receipt(self, receipt: WorkReceipt, signature: bytes) -> JobPaid:
        await self._check(receipt, signature, final=False)
        accounts = self._tools.accounts
        deposit = accounts.channel(self.provider).deposit
        voucher = Voucher(self.provider, Wei(deposit * BEYOND_BPS // 10_000 + 1))
        signed = accounts.session.sign(accounts.domain, voucher)
        await self.talk.send(VoucherFrame(receipt.step, pack(voucher), signed))
        return JobPaid(self.total)


class RacesExit(Attempt):
    """Asks for its deposit back as soon as a job is accepted, and reads and vouches on, hoping to be out first."""

    async def agree(self, prompt: tuple[int, ...], max_tokens: int, parent: Parent | None) -> JobId:
        """As the base, then the exit."""
        job_id = await super().agree(prompt, max_tokens, parent)
        accounts = self._tools.accounts
        await accounts._chain.request_exit(ChannelKey(self.provider, accounts.session.address))
        return job_id


def install(attempt: type[Attempt]) -> None:
    """Have this process buy with `attempt`."""
    stand_in("node.client.router", "Attempt", attempt)
