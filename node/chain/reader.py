"""What the contracts say, read at a block: the confirmed one for whatever decides about money, else the newest."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from incentives.ledger import ChannelKey, SlotSeen
from node.chain.contracts import Contracts, checksum
from node.chain.rpc import Rpc, RpcRefused
from node.chain.transactions import Receipt, counts, find_receipt
from node.ports import CapacityTerms, ChainHead, ProviderRecord, ReservationRecord, StakeRecord, TariffRecord
from protocol.units import ZERO_ADDRESS, Address, Digest, Wei

_LOG_BLOCKS: Final = 5_000
"""Blocks one eth_getLogs covers. Public endpoints allow 2,000 to 10,000; one that allows less makes us halve it."""

_PARALLEL_SLOTS: Final = 8
"""Slots read at once, which is also how many connections the session keeps."""


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block, and the one before it."""

    number: int
    hash: Digest
    parent: Digest
    timestamp: int


class Reader:
    """Reads of one deployment. Each is retried as Rpc.read does. All raise ChainUnavailable and ChainError."""

    def __init__(self, rpc: Rpc, contracts: Contracts, confirmations: int) -> None:
        self._rpc, self._contracts, self._confirmations = rpc, contracts, confirmations

    async def block(self, which: int | str | Digest) -> BlockRef:
        """A block by number, tag or hash."""
        raw: Any = await self._rpc.read(lambda w3: w3.eth.get_block(which))  # type: ignore[arg-type]
        return BlockRef(
            int(raw["number"]), Digest(bytes(raw["hash"])), Digest(bytes(raw["parentHash"])), int(raw["timestamp"])
        )

    async def head(self) -> ChainHead:
        newest = await self.block("latest")
        return ChainHead(newest.number, newest.hash, newest.timestamp)

    async def confirmed(self) -> BlockRef:
        """The newest block that counts: the head itself with one confirmation, and genesis at the lowest."""
        newest = await self.block("latest")
        if self._confirmations <= 1:
            return newest
        return await self.block(max(0, newest.number - self._confirmations + 1))

    async def slot(self, key: ChannelKey, block: int) -> SlotSeen | None:
        """The slot at a block, None when it was never opened."""
        escrow, parties = self._contracts.escrow.functions, (checksum(key.provider), checksum(key.client))
        channel, owner = await asyncio.gather(
            self._call(escrow.channel(*parties), block), self._call(escrow.ownerOf(*parties), block)
        )
        owner = _address(owner)
        if owner == ZERO_ADDRESS:
            return None
        deposit, claimed, exit_at = channel
        return SlotSeen(key, owner, Wei(deposit), Wei(claimed), exit_at, block)

    async def slots(self, keys: Iterable[ChannelKey], block: int) -> dict[ChannelKey, SlotSeen | None]:
        """Several slots at a block."""
        limit = asyncio.Semaphore(_PARALLEL_SLOTS)

        async def one(key: ChannelKey) -> tuple[ChannelKey, SlotSeen | None]:
            async with limit:
                return key, await self.slot(key, block)

        return dict(await asyncio.gather(*(one(key) for key in keys)))

    async def changes(self, provider: Address, first: int, last: int) -> dict[int, set[ChannelKey]]:
        """Per block in [first, last], the channels of `provider` whose slot changed in it."""
        out: dict[int, set[ChannelKey]] = {}
        async for log in self.logs(lambda low, high: (self._contracts.slot_filter(provider, low, high),), first, last):
            out.setdefault(int(log["blockNumber"]), set()).update(self._contracts.touched(log))
        return out

    async def logs(
        self, queries: Callable[[int, int], tuple[dict[str, Any], ...]], first: int, last: int
    ) -> AsyncIterator[Any]:
        """What `queries(low, high)` find in blocks [first, last], asked for in spans that the endpoint allows."""
        span = _LOG_BLOCKS
        while first <= last:
            upto = min(last, first + span - 1)
            found: list[Any] = []
            try:
                for query in queries(first, upto):
                    ask: Any = query
                    found += await self._rpc.read(lambda w3, ask=ask: w3.eth.get_logs(ask))  # type: ignore[misc]
            except RpcRefused:
                if span == 1:
                    raise
                span = max(1, span // 2)
                continue
            for log in found:
                yield log
            first = upto + 1

    async def receipt(self, transaction: Digest) -> Receipt | None:
        """The receipt of a transaction, once it is deep enough to count."""
        receipt = await find_receipt(self._rpc, transaction)
        if receipt is None or not await counts(self._rpc, receipt, self._confirmations):
            return None
        return receipt

    async def provider(self, wallet: Address) -> ProviderRecord | None:
        return await self._provider_at(wallet, (await self.confirmed()).number)

    async def provider_by_node_key(self, node_key: Address) -> ProviderRecord | None:
        """None for a key that is unknown or was retired."""
        block = (await self.confirmed()).number
        registry = self._contracts.registry.functions
        wallet, _, until = await self._call(registry.walletOf(checksum(node_key)), block)
        if _address(wallet) == ZERO_ADDRESS or until:
            return None
        return await self._provider_at(_address(wallet), block)

    async def _provider_at(self, wallet: Address, block: int) -> ProviderRecord | None:
        registry = self._contracts.registry.functions
        node_key = _address(await self._call(registry.nodeKeyOf(checksum(wallet)), block))
        if node_key == ZERO_ADDRESS:
            return None
        active, _, _ = await self._call(registry.stakeOf(checksum(wallet)), block)
        return ProviderRecord(wallet, node_key, Wei(active))

    async def stake_of(self, wallet: Address) -> StakeRecord:
        """In the newest block."""
        call = self._contracts.registry.functions.stakeOf(checksum(wallet))
        active, unbonding, release_at = await self._call(call, "latest")
        return StakeRecord(Wei(active), Wei(unbonding), int(release_at))

    async def key_holder(self, node_key: Address) -> Address | None:
        """Whose key it is or was at the confirmed block; None for an unknown one."""
        block = (await self.confirmed()).number
        wallet, _, _ = await self._call(self._contracts.registry.functions.walletOf(checksum(node_key)), block)
        return None if _address(wallet) == ZERO_ADDRESS else _address(wallet)

    async def tariff(self, tariff_hash: Digest) -> TariffRecord | None:
        block = (await self.confirmed()).number
        provider, start, end = await self._call(self._contracts.registry.functions.tariffs(tariff_hash), block)
        return None if _address(provider) == ZERO_ADDRESS else TariffRecord(_address(provider), start, end)

    async def last_sequence(self, provider: Address, profile_id: Digest) -> int:
        call = self._contracts.registry.functions.lastSequence(checksum(provider), profile_id)
        return int(await self._call(call, "latest"))

    async def epoch_seconds(self) -> int:
        return int(await self._call(self._contracts.registry.functions.epochSeconds(), "latest"))

    async def token_balance(self, account: Address) -> Wei:
        return Wei(await self._call(self._contracts.token.functions.balanceOf(checksum(account)), "latest"))

    async def coin_balance(self, account: Address) -> int:
        return int(await self._rpc.read(lambda w3: w3.eth.get_balance(checksum(account))))

    async def allowance(self, owner: Address, spender: Address) -> Wei:
        call = self._contracts.token.functions.allowance(checksum(owner), checksum(spender))
        return Wei(await self._call(call, "latest"))

    async def earned(self, provider: Address) -> Wei:
        pending, _ = await self._call(self._contracts.escrow.functions.earnedOf(checksum(provider)), "latest")
        return Wei(pending)

    async def reservation(self, right: Digest, block: int) -> ReservationRecord | None:
        """A right at a block, None when there is none."""
        functions = self._contracts.reservations.functions
        provider, rate, holder, start, end, notice, session, per_period, profile_id, claimed = await self._call(
            functions.reservation(right), block
        )
        if _address(provider) == ZERO_ADDRESS:
            return None
        return ReservationRecord(
            right,
            _address(provider),
            Digest(bytes(profile_id)),
            _address(holder),
            _address(session),
            int(rate),
            int(start),
            int(end),
            int(notice),
            Wei(per_period),
            Wei(claimed),
        )

    async def reservations(self, account: Address) -> list[ReservationRecord]:
        """The rights that are `account`'s at the confirmed block, or were sold by it."""
        last = (await self.confirmed()).number
        filters = functools.partial(self._contracts.right_filters, account)
        ids = {
            Digest(bytes(log["topics"][1])) async for log in self.logs(filters, self._contracts.deployment.block, last)
        }
        limit = asyncio.Semaphore(_PARALLEL_SLOTS)

        async def one(right: Digest) -> ReservationRecord | None:
            async with limit:
                return await self.reservation(right, last)

        records = await asyncio.gather(*(one(right) for right in ids))
        ours = [r for r in records if r is not None and account in (r.holder, r.provider)]
        return sorted(ours, key=lambda record: (record.start, record.id))

    async def capacity(self, provider: Address, profile_id: Digest) -> CapacityTerms | None:
        call = self._contracts.reservations.functions.capacityOf(checksum(provider), profile_id)
        capacity, price, least, most, _ = await self._call(call, "latest")
        return CapacityTerms(int(capacity), Wei(price), int(least), int(most)) if least else None

    async def period_seconds(self) -> int:
        return int(await self._call(self._contracts.reservations.functions.periodSeconds(), "latest"))

    async def channel_owner(self, key: ChannelKey) -> Address:
        """Whose channel it is in the newest block; zero when nobody's."""
        call = self._contracts.escrow.functions.ownerOf(checksum(key.provider), checksum(key.client))
        return _address(await self._call(call, "latest"))

    async def node_key_and_stake(self, wallet: Address) -> tuple[Address, Wei]:
        """In the newest block; zero address when the wallet has none."""
        registry = self._contracts.registry.functions
        node_key = await self._call(registry.nodeKeyOf(checksum(wallet)), "latest")
        active, _, _ = await self._call(registry.stakeOf(checksum(wallet)), "latest")
        return _address(node_key), Wei(active)

    async def view(self, function: Any, block: int | str) -> Any:
        """The result of a call of another contract's at a block."""
        return await self._call(function, block)

    async def _call(self, function: Any, block: int | str) -> Any:
        return await self._rpc.read(lambda _: function.call(block_identifier=block))


def _address(text: str) -> Address:
    return Address(bytes.fromhex(text.removeprefix("0x")))
