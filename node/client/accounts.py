"""The client's channels: opened and topped up on chain, reserved per job, promised in vouchers.

Contract: a voucher is signed only after the receipt it pays for, and its own amount, are on disk; so a crash can at
most repeat a promise, never make a second one. What all channels have promised and what running jobs may still come to
stay together within the session key's cap. No voucher waits for the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from incentives.channel import (
    ActionRelease,
    ActionReserve,
    ActionVouch,
    Channel,
    ContractReceiveSlot,
    SendVoucher,
    apply,
)
from incentives.exposure import unsettled_cap
from incentives.ledger import ChannelKey, ReceiptVouched, Record, Role
from node.ports import Chain, ChainError, ChainUnavailable, InsufficientFunds, NoProvider, Store
from node.whole import whole
from protocol.eip712 import Domain
from protocol.errors import LocalProtocolError
from protocol.messages import Voucher, WorkReceipt
from protocol.signing import Signer
from protocol.units import MAX_AMOUNT, Address, Digest, JobId, Wei

log = logging.getLogger("tally.client.accounts")


STAKE_MEMORY_S: Final = 60.0
"""How long a provider's stake is believed. Unit: s. Unbonding takes days, so only a slash can lower it sooner."""


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
        self._locks: dict[Address, asyncio.Lock] = {}  # held while a record is written and then applied
        self._funding: dict[Address, asyncio.Task[None]] = {}
        self._stakes: dict[Address, tuple[Wei, float]] = {}  # and when they were read, monotonic
        self._ahead: dict[Address, int] = {}  # what a channel will have come to once the voucher being written counts

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
        """Have escrow for a job that may cost `worst` wei, at least `first`, and reserve what there is of it.

        Trouble with the wallet or the chain matters only when what is in escrow already does not hold `first`.
        Raises: InsufficientFunds saying how much is missing, StoreError.
        """
        self._check_cap(provider, first)
        trouble: ChainError | None = None
        try:
            await self._fund(provider, worst)
        except ChainError as exc:
            trouble = exc
        self._check_cap(provider, first)  # anew: other jobs may have reserved meanwhile
        free = self.channel(provider).free
        if free < first:
            advice = "add TALLY to the wallet (`tally wallet show`) or raise the deposit per channel"
            raise InsufficientFunds(
                f"the channel with 0x{provider.hex()} has {max(0, free)} wei free, the job's first increment may"
                f" cost {first}: {trouble or advice}"
            ) from trouble
        held = ActionReserve(job_id, Wei(min(free, worst, self._left(provider))))
        self._channels[provider] = apply(self.channel(provider), held).state

    async def seller_of(self, reservation: Digest) -> Address:
        """Whose capacity a reservation is, if our session key may use it.

        Raises: NoProvider saying why it cannot be used, ChainError.
        """
        found = await self._chain.reservation(reservation)
        if found is None:
            raise NoProvider(f"there is no reservation 0x{reservation.hex()}; `tally reservation list` shows yours")
        if found.session != self.session.address:
            raise NoProvider(
                f"reservation 0x{reservation.hex()} is not assigned to session key 0x{self.session.address.hex()}; its"
                " holder assigns it with `tally reservation assign`"
            )
        return found.provider

    # ------------------------------------------------------------------------------------------------------ exposure

    async def too_exposed(self, provider: Address, worst: Wei, now: float) -> str | None:
        """Why a job that may cost `worst` wei would put more before this provider than its stake is worth, or None.

        What was vouched for and not settled is what it could cheat for before a verdict. `now`: monotonic seconds.
        With the chain away the stake known last counts, and nothing is held against one never seen.
        """
        stake = await self._stake_of(provider, now)
        if stake is None:
            return None
        cap = unsettled_cap(stake)
        if self._exposure(provider) + worst > cap and self._exposure(provider):
            with contextlib.suppress(ChainError):
                await self._refresh(provider)  # it may have settled since we last looked
        open_now = self._exposure(provider)
        if open_now + worst <= cap:
            return None
        return (
            f"its stake of {stake} wei covers {cap} wei of unsettled work, {open_now} are open and the job may cost"
            f" {worst}"
        )

    def _exposure(self, provider: Address) -> int:
        channel = self.channel(provider)
        return max(0, max(channel.vouched, self._may_come_to(provider)) - channel.claimed)

    async def _stake_of(self, provider: Address, now: float) -> Wei | None:
        """What it has staked, believed for STAKE_MEMORY_S."""
        known = self._stakes.get(provider)
        if known is None or now - known[1] > STAKE_MEMORY_S:
            try:
                record = await self._chain.provider(provider)
            except ChainError as exc:
                log.debug("the stake of 0x%s could not be read: %s", provider.hex(), exc)
            else:
                known = self._stakes[provider] = (Wei(0) if record is None else record.stake, now)
        return None if known is None else known[0]

    # ------------------------------------------------------------------------------------------------------- the cap

    def _may_come_to(self, provider: Address) -> int:
        """What the channel owes, and will owe if its running jobs use up all that is reserved for them, in wei."""
        channel = self.channel(provider)
        return max(channel.owed + sum(channel.reserved.values()), self._ahead.get(provider, 0))

    def _left(self, provider: Address) -> Wei:
        """What one more job with `provider` may cost under the cap. Credit in its channel counts as spendable."""
        if not self._limits.total:
            return Wei(MAX_AMOUNT)
        others = sum(
            max(channel.vouched, self._may_come_to(other))
            for other, channel in self._channels.items()
            if other != provider
        )
        return Wei(max(0, self._limits.total - others - self._may_come_to(provider)))

    def _check_cap(self, provider: Address, needed: int) -> None:
        """Raises: InsufficientFunds when `needed` wei more with `provider` would pass the cap."""
        if needed > self._left(provider):
            raise InsufficientFunds(
                f"this session key may spend {self._limits.total} wei in all, has spent {self.spent}, and its running"
                f" jobs may need the rest: {self._left(provider)} wei are left where {needed} are needed; raise its cap"
            )

    # ------------------------------------------------------------------------------------------------------- funding

    async def _fund(self, provider: Address, worst: Wei) -> None:
        """Have `worst` wei free, or as much as cap and wallet give; jobs that need it at the same time share a deposit.

        A caller that leaves does not stop it: a deposit once sent cannot be taken back, only seen or made twice.
        Raises: ChainError, StoreError.
        """
        mine = False
        while not mine and self.channel(provider).free < min(worst, self._left(provider)):
            task = self._funding.get(provider)
            if task is None:
                mine, task = True, asyncio.create_task(self._deposit(provider, worst))
                self._funding[provider] = task
                task.add_done_callback(lambda done: self._funded(provider, done))
            await asyncio.shield(task)

    def _funded(self, provider: Address, task: asyncio.Task[None]) -> None:
        del self._funding[provider]
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.warning("no deposit was made for 0x%s, spending only what is in escrow: %s", provider.hex(), exc)

    async def _deposit(self, provider: Address, worst: Wei) -> None:
        """Look at the slot, then open or top up from the wallet as far as it goes. Raises: ChainError, StoreError."""
        await self._refresh(provider)
        free, left = self.channel(provider).free, self._left(provider)
        missing = min(worst, left) - free
        if missing <= 0 or self._wallet is None:
            return
        # no more than the cap lets this channel spend: a provider serves up to the escrow it sees, not up to our cap
        amount = min(max(missing, self._limits.deposit), left - free, await self._chain.token_balance(self._wallet))
        if amount <= 0:
            return
        try:
            await self._chain.open_channel(provider, self.session.secret, Wei(amount))
        except ChainUnavailable:
            with contextlib.suppress(ChainError):
                await self._refresh(provider)  # it may have been mined all the same
            raise
        await self._refresh(provider)

    async def _refresh(self, provider: Address) -> None:
        slot = await self._chain.slot(ChannelKey(provider, self.session.address))
        if slot is not None:
            async with self._lock(provider):
                await self._store.write(slot)
                self._channels[provider] = apply(self.channel(provider), ContractReceiveSlot(slot)).state

    # ------------------------------------------------------------------------------------------------------ promising

    async def vouch(
        self,
        provider: Address,
        job_id: JobId,
        before: Wei,
        receipt: WorkReceipt,
        receipt_digest: Digest,
        receipt_signature: bytes,
        token_ids: tuple[int, ...],
        beside: tuple[Record, ...] = (),
    ) -> tuple[Voucher, bytes]:
        """Promise a checked receipt, which moved its job from `before` wei: journal, then sign.

        `beside`: what else goes into the journal in the same write.
        Raises: Overspend when the channel does not hold it, InsufficientFunds when it would pass the cap, StoreError;
        then nothing was promised.
        """
        voucher = await whole(
            self._promise(
                provider,
                ActionVouch(job_id, before, Wei(receipt.total)),
                lambda made: ReceiptVouched(receipt_digest, receipt, receipt_signature, made, token_ids),
                beside,
            )
        )
        return voucher, self.session.sign(self.domain, voucher)

    async def _promise(
        self,
        provider: Address,
        change: ActionVouch,
        record: Callable[[Voucher], ReceiptVouched],
        beside: tuple[Record, ...],
    ) -> Voucher:
        """Journal the voucher for `change`, then count it. Raises: Overspend, InsufficientFunds, StoreError."""
        async with self._lock(provider):
            channel, reserved_for = self.channel(provider), self._may_come_to(provider)
            step = apply(channel, change)
            voucher = self._voucher(provider, step.effects)
            comes_to = step.state.owed + sum(step.state.reserved.values())
            if comes_to > max(channel.vouched, reserved_for):  # neither credit nor its own reservation covers it
                self._check_cap(provider, comes_to - reserved_for)
            self._ahead[provider] = comes_to
            try:
                # SPEC 4.5: The client writes a checked receipt and the voucher's amount to disk and syncs
                await self._store.write(record(voucher), *beside)
                # applied anew: jobs may have been released or reserved for while the journal was written
                self._channels[provider] = apply(self.channel(provider), change).state
            finally:
                del self._ahead[provider]
        return voucher

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
