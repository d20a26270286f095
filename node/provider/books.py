"""The provider's channels: every job's reservations and vouchers go through here, one step at a time per channel.

Contract: what `take_voucher` returned from is on disk; what `reserve` granted is covered by confirmed escrow.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from incentives.channel import (
    ActionRelease,
    ActionReserve,
    Channel,
    ContractReceiveSlot,
    ReceiveVoucher,
    SettleNow,
    apply,
)
from incentives.ledger import ChannelKey, Role, SlotSeen, VoucherReceived
from node.ports import Chain, ChainUnavailable, Store
from protocol.errors import RemoteProtocolError
from protocol.messages import Voucher
from protocol.signing import verify
from protocol.units import Address, JobId, Wei

log = logging.getLogger("tally.provider.books")


UNPAID_INCREMENTS: Final = 2
"""First increments that a payer may owe for good before it is refused. Unit: increments of the job it asks for. An
honest one whose network broke pays it off by its next job; doubling it doubles what a dishonest one gets."""


class Books:
    """All channels of one provider wallet. `on_exit` is called when a payer asks to leave with vouchers unsettled."""

    def __init__(self, provider: Address, store: Store, chain: Chain, on_exit: Callable[[], None]) -> None:
        self._provider = provider
        self._store = store
        self._chain = chain
        self._on_exit = on_exit
        self._channels: dict[Address, Channel] = {}
        self._signatures: dict[Address, bytes] = {}
        self._locks: dict[Address, asyncio.Lock] = {}
        self._unpaid: dict[Address, Wei] = {}
        self._blocks: dict[Address, int] = {}  # newest block each slot was seen at

    async def load(self) -> None:
        """Rebuild every channel from the journal. Raises: StoreError."""
        for account in await self._store.accounts(Role.PROVIDER):
            if account.key.provider != self._provider:
                continue  # a channel this node pays from: the journal serves both roles
            self._channels[account.key.client] = Channel(
                account.key, account.deposit, account.claimed, account.exit_at, account.owed, account.vouched
            )
            self._signatures[account.key.client] = account.voucher_signature

    def channels(self) -> list[tuple[Channel, bytes]]:
        """Every channel with the signature of its highest voucher."""
        return [(channel, self._signatures.get(client, b"")) for client, channel in self._channels.items()]

    def channel(self, client: Address) -> Channel:
        """The channel as known now; an empty one when the chain has shown none."""
        return self._channels.get(client) or Channel(ChannelKey(self._provider, client))

    async def confirm(self, client: Address, needed: Wei) -> Channel:
        """The channel, after a look at the chain when what we know would not cover `needed`.

        With the RPC down the last confirmed slot stands: we serve up to it and no further.
        """
        if self.channel(client).free < needed:
            await self.refresh(client)
        return self.channel(client)

    async def refresh(self, client: Address) -> None:
        """Look at the slot on the chain now; keep what is known when the chain does not answer."""
        try:
            slot = await self._chain.slot(ChannelKey(self._provider, client))
        except ChainUnavailable:
            log.warning("the chain does not answer; serving %s up to its confirmed escrow", client.hex())
        else:
            if slot is not None and slot.block >= self._blocks.get(client, 0):  # else a later look overtook this one
                await self.see_slot(slot)

    async def see_slot(self, slot: SlotSeen) -> None:
        """Take in an escrow slot that the chain shows. Raises: StoreError."""
        async with self._lock(slot.key.client):
            await self._store.write(slot)
            step = apply(self.channel(slot.key.client), ContractReceiveSlot(slot))
            self._channels[slot.key.client] = step.state
            self._blocks[slot.key.client] = slot.block
        if any(isinstance(effect, SettleNow) for effect in step.effects):
            self._on_exit()

    def trusts(self, client: Address, first: Wei) -> bool:
        """Whether what this payer was given and never vouched for leaves room for another first increment.

        Each job may lose one increment; without this account a payer could live on first increments alone.
        """
        return self._unpaid.get(client, 0) <= UNPAID_INCREMENTS * first

    def lose(self, client: Address, amount: Wei) -> None:
        """A job ended with `amount` wei delivered and not vouched for. Forgotten at a restart, as is who lost it."""
        if amount > 0:
            self._unpaid[client] = Wei(self._unpaid.get(client, 0) + amount)

    def reserve(self, client: Address, job_id: JobId, amount: Wei) -> None:
        """Raises: Overspend when confirmed escrow does not cover it."""
        self._channels[client] = apply(self.channel(client), ActionReserve(job_id, amount)).state

    def release(self, client: Address, job_id: JobId) -> None:
        """The job is over."""
        self._channels[client] = apply(self.channel(client), ActionRelease(job_id)).state

    async def take_voucher(
        self, client: Address, job_id: JobId, step: int, before: Wei, after: Wei, voucher: Voucher, signature: bytes
    ) -> None:
        """Check, journal, then count a voucher for receipt `step`, which moved the job from `before` to `after` wei.

        Raises: BadSignature, Overspend, StaleVoucher, RemoteProtocolError, StoreError; then nothing was counted.
        """
        if voucher.provider != self._provider:
            raise RemoteProtocolError("the voucher is for another provider")
        verify(self._chain.domain, voucher, signature, client)
        async with self._lock(client):
            # SPEC 4.6: refuses one above the confirmed deposit and one that does not cover what it acknowledges
            change = ReceiveVoucher(job_id, before, after, Wei(voucher.cumulative))
            apply(self.channel(client), change)
            await self._store.write(VoucherReceived(client, job_id, step, voucher, signature))
            raised = voucher.cumulative > self.channel(client).vouched
            self._channels[client] = apply(self.channel(client), change).state
            if raised:
                self._signatures[client] = signature
            if client in self._unpaid and after > before:
                self._unpaid[client] = Wei(max(0, self._unpaid[client] - (after - before)))

    async def cover(self, client: Address, job_id: JobId, step: int, before: Wei, after: Wei) -> bool:
        """Count a receipt that comes to no more than was vouched for: our voucher covers it; False if none does.

        A refund lowers the final receipt. It must count before the client can see it: a client that has counted it
        promises less for its next job than we would ask, should its acknowledgement be lost. Raises: StoreError.
        """
        channel, signature = self.channel(client), self._signatures.get(client, b"")
        if after > before or not signature or channel.vouched > channel.deposit:
            return False
        await self.take_voucher(
            client, job_id, step, before, after, Voucher(self._provider, channel.vouched), signature
        )
        return True

    def _lock(self, client: Address) -> asyncio.Lock:
        return self._locks.setdefault(client, asyncio.Lock())
