"""MemoryChain: the Chain port over a world in memory, as one node sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from eth_hash.auto import keccak

from incentives.ledger import ChannelKey, SlotSeen
from node.chain.errors import NotEnoughTally, NoWallet, OutOfCoin, TransactionReplaced
from node.chain.packing import is_packable
from node.ports import (
    CapacityTerms,
    ChainError,
    ChainHead,
    ChainUnavailable,
    Mined,
    PreparedSettlement,
    ProviderRecord,
    ReservationOrder,
    ReservationRecord,
    Settled,
    SlotHandler,
    StakeRecord,
    TariffRecord,
)
from protocol.eip712 import Domain
from protocol.messages import NodeKeyConsent, SessionConsent, Tariff
from protocol.signing import Signer
from protocol.units import ZERO_ADDRESS, Address, Digest, Wei
from tests.twins import memory_capacity
from tests.twins import memory_contracts as contracts
from tests.twins.memory_ledger import GAS, GAS_PRICE, Block, MemoryLedgerChain, Outcome, Transaction

_CONSENT_SECONDS = 3600
_HEAD_BYTES = 48  # nonce 8, sender 20, provider 20
_ITEM_BYTES = 77  # cumulative 12, signature 65


class MemoryChain:
    """One node's view. `down`: this node's RPC does not answer. `lag`: blocks its RPC is behind the others'.

    `confirmations`: how many blocks deep a block must be to count, itself included.
    """

    def __init__(self, world: MemoryLedgerChain, wallet: Signer | None = None, confirmations: int = 1) -> None:
        self.world, self.wallet, self.confirmations = world, wallet, confirmations
        self.lag = 0
        self._down = False

    @property
    def down(self) -> bool:
        return self._down

    @down.setter
    def down(self, value: bool) -> None:
        self._down = value
        self.world.notify()

    @property
    def domain(self) -> Domain:
        return self.world.domain

    async def start(self) -> None:
        self._check()

    async def stop(self) -> None:
        pass

    # ---------------------------------------------------------------------------------------------------- reading

    async def head(self) -> ChainHead:
        block = self._latest()
        return ChainHead(block.number, block.hash, block.state.timestamp)

    async def slot(self, key: ChannelKey) -> SlotSeen | None:
        return self._slot(self._confirmed(), key)

    async def watch_slots(self, provider: Address, handler: SlotHandler, *, from_block: int = 0) -> None:
        known: dict[ChannelKey, SlotSeen] = {}
        while True:
            tick = self.world.tick
            if not self._is_down():
                block = self._confirmed()
                for key in [k for k in block.state.channels if k.provider == provider and k not in known] + list(known):
                    seen = self._slot(block, key) or SlotSeen(key, ZERO_ADDRESS, Wei(0), Wei(0), 0, block.number)
                    if key not in known or _content(known[key]) != _content(seen):
                        known[key] = seen
                        await handler(seen)
            await tick.wait()

    async def provider_by_node_key(self, node_key: Address) -> ProviderRecord | None:
        wallet = self._confirmed().state.wallets.get(node_key)
        record = await self.provider(wallet) if wallet is not None else None
        return record if record is not None and record.node_key == node_key else None

    async def provider(self, wallet: Address) -> ProviderRecord | None:
        state = self._confirmed().state
        node_key = state.node_keys.get(wallet)
        return None if node_key is None else ProviderRecord(wallet, node_key, Wei(state.stakes.get(wallet, 0)))

    async def stake_of(self, wallet: Address) -> StakeRecord:
        state = self._latest().state
        unbonding, release_at = state.unbonding.get(wallet, (0, 0))
        return StakeRecord(Wei(state.stakes.get(wallet, 0)), Wei(unbonding), release_at)

    async def key_holder(self, node_key: Address) -> Address | None:
        return self._confirmed().state.wallets.get(node_key)

    async def tariff(self, tariff_hash: Digest) -> TariffRecord | None:
        return self._confirmed().state.tariffs.get(tariff_hash)

    async def last_sequence(self, provider: Address, profile_id: Digest) -> int:
        return self._latest().state.sequences.get((provider, profile_id), 0)

    async def token_balance(self, account: Address) -> Wei:
        return Wei(self._latest().state.tally.get(account, 0))

    async def coin_balance(self, account: Address) -> int:
        return self._latest().state.coin.get(account, 0)

    async def earned(self, provider: Address) -> Wei:
        return Wei(self._latest().state.earned.get(provider, 0))

    async def epoch_seconds(self) -> int:
        self._check()
        return self.world.epoch_seconds

    # ---------------------------------------------------------------------------------------------------- writing

    async def transfer(self, to: Address, amount: Wei) -> Mined:
        sender = self._signer("a transfer").address
        self._need_tally("transfer", amount)
        return await self._send("transfer", lambda s: contracts.transfer(s, sender, to, amount))

    async def open_channel(self, provider: Address, session_secret: bytes, amount: Wei) -> Mined:
        sender, session = self._signer("opening a channel").address, Signer.from_secret(session_secret)
        key = ChannelKey(provider, session.address)
        self._need_tally("open", amount)
        if self._latest().state.channels.get(key, contracts.Channel()).owner == sender:
            return await self._send("topUp", lambda s: contracts.top_up(s, sender, key, amount))
        consent = SessionConsent(sender, provider, self._latest().state.timestamp + _CONSENT_SECONDS)
        signed = (consent, session.sign(self.domain, consent))
        run = lambda s: contracts.open_channel(s, self.domain, sender, key.client, amount, signed)  # noqa: E731
        return await self._send("open", run)

    async def request_exit(self, key: ChannelKey) -> Mined:
        sender, delay = self._signer("an exit").address, self.world.exit_delay
        return await self._send("requestExit", lambda s: contracts.request_exit(s, sender, key, delay))

    async def exit(self, key: ChannelKey) -> Mined:
        sender = self._signer("an exit").address
        return await self._send("exit", lambda s: contracts.exit_channel(s, sender, key))

    async def register_provider(self, node_secret: bytes, stake: Wei) -> None:
        sender, node = self._signer("registering").address, Signer.from_secret(node_secret)
        state = self._latest().state
        if state.node_keys.get(sender) != node.address:
            deadline = state.timestamp + _CONSENT_SECONDS
            signature = node.sign(self.domain, NodeKeyConsent(sender, deadline))
            bind = partial(contracts.bind_node_key, domain=self.domain, sender=sender)
            await self._send(
                "register", lambda s: bind(s, node_key=node.address, deadline=deadline, signature=signature)
            )
        missing = stake - state.stakes.get(sender, 0)
        if missing > 0:
            self._need_tally("stake", missing)
            await self._send("stake", lambda s: contracts.stake(s, sender, missing, self.world.min_stake))

    async def request_unbond(self, amount: Wei) -> Mined:
        sender, least, delay = self._signer("unbonding").address, self.world.min_stake, self.world.unbond_delay
        return await self._send("requestUnbond", lambda s: contracts.request_unbond(s, sender, amount, least, delay))

    async def withdraw_stake(self) -> Mined:
        sender = self._signer("a withdrawal").address
        return await self._send("withdraw", lambda s: contracts.withdraw(s, sender))

    async def log_tariff(self, tariff: Tariff, signature: bytes) -> Mined:
        self._signer("logging a tariff")
        log = partial(contracts.log_tariff, domain=self.domain, tariff=tariff, signature=signature)
        return await self._send("logTariff", lambda s: log(s, epoch_seconds=self.world.epoch_seconds))

    async def collect(self, provider: Address) -> Mined:
        self._signer("collecting")
        return await self._send("collect", lambda s: contracts.collect(s, provider))

    # ---------------------------------------------------------------------------------------------- reservations

    async def reservation(self, reservation_id: Digest) -> ReservationRecord | None:
        return self._confirmed().state.rights.get(reservation_id)

    async def reservations(self, account: Address) -> list[ReservationRecord]:
        rights = self._confirmed().state.rights.values()
        return sorted((r for r in rights if account in (r.holder, r.provider)), key=lambda r: (r.start, r.id))

    async def capacity(self, provider: Address, profile_id: Digest) -> CapacityTerms | None:
        return self._latest().state.capacities.get((provider, profile_id))

    async def period_seconds(self) -> int:
        self._check()
        return memory_capacity.PERIOD_S

    async def offer_capacity(self, profile_id: Digest, terms: CapacityTerms) -> Mined:
        sender = self._signer("an offer of capacity").address
        return await self._send("offer", lambda s: memory_capacity.offer(s, sender, profile_id, terms))

    async def buy_reservation(self, order: ReservationOrder) -> tuple[Digest, Mined]:
        sender = self._signer("a purchase").address
        self._need_tally("buy a reservation", order.max_cost)
        right = memory_capacity.next_id(self._latest().state, sender)
        return right, await self._send("buy", lambda s: memory_capacity.buy(s, sender, order))

    async def transfer_reservation(self, reservation_id: Digest, to: Address) -> Mined:
        sender = self._signer("a transfer").address
        return await self._send("transfer", lambda s: memory_capacity.transfer(s, sender, reservation_id, to))

    async def assign_reservation(self, reservation_id: Digest, session: Address) -> Mined:
        sender = self._signer("an assignment").address
        return await self._send("assign", lambda s: memory_capacity.assign(s, sender, reservation_id, session))

    async def quit_reservation(self, reservation_id: Digest) -> Mined:
        sender = self._signer("quitting").address
        return await self._send("quit", lambda s: memory_capacity.quit_right(s, sender, reservation_id))

    async def release_reservation(self, reservation_id: Digest) -> Mined:
        sender = self._signer("a release").address
        return await self._send("release", lambda s: memory_capacity.release(s, sender, reservation_id))

    async def claim_reservation(self, provider: Address, reservation_ids: Sequence[Digest]) -> Mined:
        self._signer("a claim")
        rights = tuple(reservation_ids)
        return await self._send("claim", lambda s: memory_capacity.claim(s, provider, rights))

    # ----------------------------------------------------------------------------------------------- settlements

    async def prepare_settlement(
        self, provider: Address, vouchers: Sequence[tuple[Address, Wei, bytes]]
    ) -> PreparedSettlement:
        sender = self._signer("a settlement").address
        self._check()
        raw = self.world.next_nonce(sender).to_bytes(8, "big") + sender + provider
        packable = [item for item in vouchers if is_packable(item[2])]
        raw += b"".join(cumulative.to_bytes(12, "big") + signature for _, cumulative, signature in packable)
        return PreparedSettlement(Digest(keccak(raw)), raw, tuple((client, total) for client, total, _ in packable))

    async def send_settlement(self, prepared: PreparedSettlement) -> Settled:
        self._check()
        block, outcome = await self._submit(self._settlement(prepared))
        return _settled(prepared.transaction, block, outcome)

    async def settlement_result(self, transaction: Digest) -> Settled | None:
        found = self._found(transaction)
        return None if found is None else _settled(transaction, *found)

    def _settlement(self, prepared: PreparedSettlement) -> Transaction:
        raw = prepared.raw
        sender, provider = Address(raw[8:28]), Address(raw[28:48])
        items = [raw[i : i + _ITEM_BYTES] for i in range(_HEAD_BYTES, len(raw), _ITEM_BYTES)]
        vouchers = tuple((Wei(int.from_bytes(item[:12], "big")), item[12:]) for item in items)
        run = lambda s: contracts.settle(s, self.domain, provider, vouchers)  # noqa: E731
        return Transaction(prepared.transaction, sender, int.from_bytes(raw[:8], "big"), run)

    # ------------------------------------------------------------------------------------------ for the Court's twin

    def seen_state(self, *, confirmed: bool) -> contracts.State:
        """The state this node sees, of its newest or its confirmed block. Raises: ChainUnavailable."""
        return (self._confirmed() if confirmed else self._latest()).state

    async def confirmed_head(self) -> ChainHead:
        block = self._confirmed()
        return ChainHead(block.number, block.hash, block.state.timestamp)

    def sender(self, action: str) -> Address:
        """Raises: NoWallet."""
        return self._signer(action).address

    async def transact(self, action: str, run: Callable[[contracts.State], object]) -> Mined:
        """Send a transaction of another contract's. Raises: ChainUnavailable, ChainError."""
        return await self._send(action, run)

    # ---------------------------------------------------------------------------------------------------- inside

    def _is_down(self) -> bool:
        return self._down or self.world.down

    def _check(self) -> None:
        if self._is_down():
            raise ChainUnavailable("the chain's RPC does not answer; what was confirmed stays valid, try again later")

    def _latest(self) -> Block:
        self._check()
        return self.world.blocks[max(0, len(self.world.blocks) - 1 - self.lag)]

    def _confirmed(self) -> Block:
        return self.world.blocks[max(0, self._latest().number - self.confirmations + 1)]

    def _slot(self, block: Block, key: ChannelKey) -> SlotSeen | None:
        channel = block.state.channels.get(key)
        if channel is None:
            return None
        money = Wei(channel.deposit), Wei(channel.claimed)
        return SlotSeen(key, channel.owner, *money, channel.exit_at, block.number)

    def _signer(self, action: str) -> Signer:
        if self.wallet is None:
            raise NoWallet(action)
        return self.wallet

    def _need_tally(self, action: str, needs: int) -> None:
        wallet = self._signer(action).address
        has = self._latest().state.tally.get(wallet, 0)
        if has < needs:
            raise NotEnoughTally(action, wallet, has, needs)

    def _found(self, transaction: Digest) -> tuple[Block, Outcome] | None:
        confirmed = self._confirmed().number
        found = self.world.find(transaction)
        return found if found is not None and found[0].number <= confirmed else None

    async def _send(self, action: str, run: Callable[[contracts.State], object]) -> Mined:
        """Try it on the head first, as gas estimation does, so that what would revert is not sent."""
        sender = self._signer(action).address
        run(self._latest().state.copy(self._latest().state.timestamp))
        nonce = self.world.next_nonce(sender)
        transaction = Transaction(Digest(keccak(sender + b"%d|%s" % (nonce, action.encode()))), sender, nonce, run)
        block, outcome = await self._submit(transaction)
        if outcome.error is not None:
            raise outcome.error
        return _mined(transaction.hash, block)

    async def _submit(self, transaction: Transaction) -> tuple[Block, Outcome]:
        if self._latest().state.coin.get(transaction.sender, 0) < GAS * GAS_PRICE:
            raise OutOfCoin(transaction.sender)
        while True:
            if self.world.find(transaction.hash) is None:
                if self._latest().state.nonces.get(transaction.sender, 0) > transaction.nonce:
                    raise TransactionReplaced(transaction.hash, transaction.nonce)
                self.world.submit(transaction)
            tick = self.world.tick
            found = self._found(transaction.hash)
            if found is not None:
                return found
            await tick.wait()


def _content(seen: SlotSeen) -> tuple[Address, Wei, Wei, int]:
    return seen.owner, seen.deposit, seen.claimed, seen.exit_at


def _mined(transaction: Digest, block: Block) -> Mined:
    return Mined(transaction, block.number, GAS, GAS * GAS_PRICE)


def _settled(transaction: Digest, block: Block, outcome: Outcome) -> Settled:
    if outcome.error is not None:
        raise outcome.error
    if outcome.event is None:
        raise ChainError(f"transaction 0x{transaction.hex()} is no settlement")
    event = outcome.event
    return Settled(_mined(transaction, block), Wei(event.paid), Wei(event.fee), tuple(dict(event.claims).items()))
