"""The client's channels: opened and topped up on chain, reserved per job, promised in vouchers.

Contract: a voucher is signed only after the receipt it pays for, and its own amount, are on disk; so a crash can at
most repeat a promise, never make a second one.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from incentives.channel import (
    ActionRelease,
    ActionReserve,
    ActionVouch,
    Channel,
    ContractReceiveSlot,
    SendVoucher,
    apply,
)
from incentives.ledger import ChannelKey, ReceiptVouched, Role
from node.ports import Chain, ChainError, ChainUnavailable, InsufficientFunds, Store
from protocol.eip712 import Domain
from protocol.errors import LocalProtocolError
from protocol.messages import Voucher, WorkReceipt
from protocol.signing import Signer
from protocol.units import Address, Digest, JobId, Wei

log = logging.getLogger("tally.client.accounts")


@dataclass(frozen=True, slots=True)
class SpendingLimits:
    """`deposit`: wei put into a channel when it is opened or runs dry. `total`: most wei ever vouched, 0 for no cap."""

    deposit: Wei
    total: Wei


class Accounts:
    """All channels that one session key pays from. `wallet`: whose tokens fund them; None when only spending."""

    def __init__(
        self, session: Signer, wallet: Address | None, limits: SpendingLimits, store: Store, chain: Chain
    ) -> None:
        self.session = session
        self._wallet = wallet
        self._limits = limits
        self._store = store
        self._chain = chain
        self._channels: dict[Address, Channel] = {}
        self._locks: dict[Address, asyncio.Lock] = {}

    @property
    def domain(self) -> Domain:
        return self._chain.domain

    async def load(self) -> None:
        """Rebuild every channel from the journal. Raises: StoreError."""
        for account in await self._store.accounts(Role.CLIENT):
            if account.key.client == self.session.address:
                self._channels[account.key.provider] = Channel(
                    account.key, account.deposit, account.claimed, account.exit_at, account.owed, account.vouched
                )

    def channels(self) -> list[Channel]:
        """Every channel known."""
        return list(self._channels.values())

    def channel(self, provider: Address) -> Channel:
        """The channel as known now; an empty one when none was opened."""
        return self._channels.get(provider) or Channel(ChannelKey(provider, self.session.address))

    @property
    def spent(self) -> Wei:
        """Vouched over all channels."""
        return Wei(sum(channel.vouched for channel in self._channels.values()))

    async def ensure(self, provider: Address, job_id: JobId, first: Wei, worst: Wei) -> None:
        """Have escrow for a job that may cost `worst` wei, at least `first`, and reserve it.

        Raises: InsufficientFunds saying how much is missing.
        """
        if self._limits.total and self.spent + first > self._limits.total:
            raise InsufficientFunds(
                f"this session key may spend {self._limits.total} wei in all and has spent {self.spent}; raise its cap"
            )
        async with self._lock(provider):
            if self.channel(provider).free < worst:
                await self._fund(provider, worst)
            free = self.channel(provider).free
            if free < first:
                raise InsufficientFunds(
                    f"the channel with 0x{provider.hex()} has {max(0, free)} wei free, the job's first increment may"
                    f" cost {first}: add TALLY to the wallet (`tally wallet show`) or raise the deposit per channel"
                )
            held = ActionReserve(job_id, Wei(min(free, worst)))
            self._channels[provider] = apply(self.channel(provider), held).state

    async def _fund(self, provider: Address, worst: Wei) -> None:
        """Look at the slot, then open or top up from the wallet as far as it goes."""
        try:
            await self._refresh(provider)
            channel = self.channel(provider)
            missing = worst - channel.free
            if missing <= 0 or self._wallet is None:
                return
            amount = min(max(missing, self._limits.deposit), await self._chain.token_balance(self._wallet))
            if amount > 0:
                await self._chain.open_channel(provider, self.session.secret, Wei(amount))
                await self._refresh(provider)
        except ChainUnavailable as exc:
            log.warning("the chain does not answer, spending only what is already in escrow: %s", exc)
        except ChainError as exc:
            raise InsufficientFunds(f"the channel with 0x{provider.hex()} could not be funded: {exc}") from exc

    async def _refresh(self, provider: Address) -> None:
        slot = await self._chain.slot(ChannelKey(provider, self.session.address))
        if slot is not None:
            await self._store.write(slot)
            self._channels[provider] = apply(self.channel(provider), ContractReceiveSlot(slot)).state

    async def vouch(
        self,
        provider: Address,
        job_id: JobId,
        before: Wei,
        receipt: WorkReceipt,
        receipt_digest: Digest,
        receipt_signature: bytes,
        token_ids: tuple[int, ...],
    ) -> tuple[Voucher, bytes]:
        """Promise a checked receipt, which moved its job from `before` wei: journal, then sign.

        Raises: Overspend when the channel does not hold it, StoreError; then nothing was promised.
        """
        async with self._lock(provider):
            change = ActionVouch(job_id, before, Wei(receipt.total))
            voucher = self._voucher(provider, apply(self.channel(provider), change).effects)
            # SPEC 4.5: The client writes a checked receipt and the voucher's amount to disk and syncs before it signs
            await self._store.write(ReceiptVouched(receipt_digest, receipt, receipt_signature, voucher, token_ids))
            # applied anew: a job may have been released while the journal was written
            self._channels[provider] = apply(self.channel(provider), change).state
        return voucher, self.session.sign(self.domain, voucher)

    def _voucher(self, provider: Address, effects: tuple[object, ...]) -> Voucher:
        for effect in effects:
            if isinstance(effect, SendVoucher):
                return Voucher(provider, effect.cumulative)
        raise LocalProtocolError("vouching for a receipt gave no voucher")

    def release(self, provider: Address, job_id: JobId) -> None:
        """The job is over."""
        self._channels[provider] = apply(self.channel(provider), ActionRelease(job_id)).state

    def _lock(self, provider: Address) -> asyncio.Lock:
        return self._locks.setdefault(provider, asyncio.Lock())
