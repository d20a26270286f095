"""Web3Chain: the Chain port over a JSON-RPC endpoint. Importing this module does not import web3."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from incentives.ledger import ChannelKey, SlotSeen
from node.chain.deployment import Deployment
from node.chain.errors import NoContract, NotEnoughTally, NoWallet, WrongChain
from node.chain.packing import is_packable
from node.chain.rpc import Rpc, RpcLimits
from node.chain.watcher import SlotWatcher
from node.ports import (
    CapacityTerms,
    ChainError,
    ChainHead,
    ChainUnavailable,
    Clock,
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

if TYPE_CHECKING:
    from node.chain.contracts import Contracts
    from node.chain.reader import Reader
    from node.chain.sender import Sender
    from node.chain.transactions import Receipt

_CONSENT_SECONDS: Final = 3_600
"""How long a session or node key's consent is good for. It is used in the next block; an hour covers a stuck one."""

_SETTLE_BASE_GAS: Final = 150_000
_SETTLE_ITEM_GAS: Final = 15_000
"""Least gas limit of a settlement: base, and per voucher. An item that would pay nothing when estimated can pay when
mined (its channel was topped up in between), so the estimate alone could run out. Measured: under 11,000 an item."""


@dataclass(frozen=True, slots=True)
class ChainOptions:
    """How a node follows the chain. `confirmations`: blocks, the one itself included; 1 on a devnet.

    `poll_s`: pause between looks for new blocks and receipts. `stuck_s`, `deadline_s`: see SendPolicy.
    """

    confirmations: int = 1
    poll_s: float = 1.0
    stuck_s: float = 45.0
    deadline_s: float = 300.0
    reservation_s: float = 5.0
    rpc: RpcLimits = field(default_factory=RpcLimits)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What exists once web3 was imported. `named`: within it, reverts carry the contract's name for them."""

    contracts: Contracts
    reader: Reader
    sender: Sender | None
    named: Callable[[str], AbstractContextManager[None]]


class Web3Chain:
    """The contracts of `deployment`, through the RPC at `rpc_url`, acting for `wallet` (None: read only)."""

    def __init__(
        self,
        rpc_url: str,
        deployment: Deployment,
        wallet: Signer | None,
        *,
        clock: Clock,
        options: ChainOptions | None = None,
    ) -> None:
        self._deployment, self._wallet, self._clock = deployment, wallet, clock
        self._options = options or ChainOptions()
        self._rpc = Rpc(rpc_url, clock, self._options.rpc)
        self._started: _Parts | None = None
        self._allowance = asyncio.Lock()  # from an approval until what it was given for is spent

    @property
    def domain(self) -> Domain:
        return self._deployment.domain

    async def start(self) -> None:
        """Connect and check the chain id and the code at each address. Idempotent.

        Raises: ChainUnavailable; WrongChain, NoContract (both ChainError). After either, `start` may be called again.
        """
        from node.chain.contracts import Contracts, named_reverts
        from node.chain.reader import Reader
        from node.chain.sender import Sender, SendPolicy

        if self._started is not None:
            return
        await self._rpc.start()
        try:
            await self._check_chain()
        except BaseException:
            await self._rpc.stop()
            raise
        contracts = Contracts(self._rpc.w3, self._deployment)
        options = self._options
        policy = SendPolicy(
            options.confirmations, options.poll_s, options.stuck_s, options.deadline_s, options.reservation_s
        )
        reader = Reader(self._rpc, contracts, options.confirmations)
        sender = Sender(self._rpc, self._wallet, self._deployment.chain_id, policy) if self._wallet else None
        self._started = _Parts(contracts, reader, sender, functools.partial(named_reverts, self._rpc.w3))

    async def stop(self) -> None:
        self._started = None
        await self._rpc.stop()

    async def _check_chain(self) -> None:
        from node.chain.contracts import checksum

        deployment = self._deployment
        found = await self._rpc.read(lambda w3: w3.eth.chain_id)
        if found != deployment.chain_id:
            raise WrongChain(deployment.chain_id, int(found), self._rpc.name)
        for name, address in (
            ("TallyToken", deployment.token),
            ("Escrow", deployment.escrow),
            ("Registry", deployment.registry),
            ("Reservations", deployment.reservations),
        ):
            shown = checksum(address)
            if not await self._rpc.read(lambda w3, shown=shown: w3.eth.get_code(shown)):  # type: ignore[misc]
                raise NoContract(name, address, deployment.chain_id)

    # ---------------------------------------------------------------------------------------------------- reading

    async def head(self) -> ChainHead:
        return await self._parts.reader.head()

    async def slot(self, key: ChannelKey) -> SlotSeen | None:
        reader = self._parts.reader
        return await reader.slot(key, (await reader.confirmed()).number)

    async def watch_slots(self, provider: Address, handler: SlotHandler, *, from_block: int = 0) -> None:
        """See the port. `from_block`: changes before it are known already; give the newest SlotSeen.block, less 64
        blocks for what may have been reorganised while nobody looked. Raises what `handler` raises."""
        first = max(from_block, self._deployment.block)
        watcher = SlotWatcher(
            self._parts.reader, provider, handler, self._clock, from_block=first, poll_s=self._options.poll_s
        )
        await watcher.run()

    async def provider_by_node_key(self, node_key: Address) -> ProviderRecord | None:
        return await self._parts.reader.provider_by_node_key(node_key)

    async def provider(self, wallet: Address) -> ProviderRecord | None:
        return await self._parts.reader.provider(wallet)

    async def stake_of(self, wallet: Address) -> StakeRecord:
        return await self._parts.reader.stake_of(wallet)

    async def key_holder(self, node_key: Address) -> Address | None:
        return await self._parts.reader.key_holder(node_key)

    async def tariff(self, tariff_hash: Digest) -> TariffRecord | None:
        return await self._parts.reader.tariff(tariff_hash)

    async def last_sequence(self, provider: Address, profile_id: Digest) -> int:
        return await self._parts.reader.last_sequence(provider, profile_id)

    async def token_balance(self, account: Address) -> Wei:
        return await self._parts.reader.token_balance(account)

    async def coin_balance(self, account: Address) -> int:
        return await self._parts.reader.coin_balance(account)

    async def earned(self, provider: Address) -> Wei:
        return await self._parts.reader.earned(provider)

    async def epoch_seconds(self) -> int:
        return await self._parts.reader.epoch_seconds()

    async def reservation(self, reservation_id: Digest) -> ReservationRecord | None:
        reader = self._parts.reader
        return await reader.reservation(reservation_id, (await reader.confirmed()).number)

    async def reservations(self, account: Address) -> list[ReservationRecord]:
        return await self._parts.reader.reservations(account)

    async def capacity(self, provider: Address, profile_id: Digest) -> CapacityTerms | None:
        return await self._parts.reader.capacity(provider, profile_id)

    async def period_seconds(self) -> int:
        return await self._parts.reader.period_seconds()

    # ---------------------------------------------------------------------------------------------------- writing

    async def transfer(self, to: Address, amount: Wei) -> Mined:
        """Send TALLY from this node's wallet. Raises: NotEnoughTally, OutOfCoin, ChainUnavailable."""
        contracts = self._parts.contracts
        await self._need_tally("transfer", amount)
        return await self._do(
            "transfer", self._deployment.token, contracts.encode(contracts.token, "transfer", to, amount)
        )

    async def open_channel(self, provider: Address, session_secret: bytes, amount: Wei) -> Mined:
        """See the port. Raises: NotEnoughTally, ContractReverted, OutOfCoin, ChainUnavailable (then it may still be
        mined: look at the slot before trying again, or the deposit is made twice)."""
        session = Signer.from_secret(session_secret)
        async with self._allowance:
            await self._need_tally("open", amount)
            await self._allow(self._deployment.escrow, amount)
            data = await self._deposit_data(provider, session, amount)
            return await self._do("open or top up", self._deployment.escrow, data)

    async def _deposit_data(self, provider: Address, session: Signer, amount: Wei) -> bytes:
        """Calldata of topUp when the channel is this wallet's, else of open."""
        parts, wallet = self._parts, self._sender("opening a channel").address
        escrow = parts.contracts.escrow
        if await parts.reader.channel_owner(ChannelKey(provider, session.address)) == wallet:
            return parts.contracts.encode(escrow, "topUp", provider, session.address, amount)
        deadline = (await parts.reader.head()).timestamp + _CONSENT_SECONDS
        consent = session.sign(self.domain, SessionConsent(wallet, provider, deadline))
        return parts.contracts.encode(escrow, "open", provider, session.address, amount, deadline, consent)

    async def request_exit(self, key: ChannelKey) -> Mined:
        return await self._on_channel("requestExit", key)

    async def exit(self, key: ChannelKey) -> Mined:
        return await self._on_channel("exit", key)

    async def register_provider(self, node_secret: bytes, stake: Wei) -> None:
        """See the port; a wallet that signs with another key is moved to this one."""
        parts, node = self._parts, Signer.from_secret(node_secret)
        wallet = self._sender("registering").address
        registry = parts.contracts.registry
        current, staked = await parts.reader.node_key_and_stake(wallet)
        if current != node.address:
            action = "register" if current == ZERO_ADDRESS else "rotateNodeKey"
            deadline = (await parts.reader.head()).timestamp + _CONSENT_SECONDS
            consent = node.sign(self.domain, NodeKeyConsent(wallet, deadline))
            data = parts.contracts.encode(registry, action, node.address, deadline, consent)
            await self._do(action, self._deployment.registry, data)
        if stake > staked:
            missing = Wei(stake - staked)
            async with self._allowance:
                await self._need_tally("stake", missing)
                await self._allow(self._deployment.registry, missing)
                data = parts.contracts.encode(registry, "stake", missing)
                await self._do("stake", self._deployment.registry, data)

    async def request_unbond(self, amount: Wei) -> Mined:
        return await self._on_registry("requestUnbond", amount)

    async def withdraw_stake(self) -> Mined:
        return await self._on_registry("withdraw")

    async def log_tariff(self, tariff: Tariff, signature: bytes) -> Mined:
        data = self._parts.contracts.log_tariff(tariff, signature)
        return await self._do("logTariff", self._deployment.registry, data)

    async def collect(self, provider: Address) -> Mined:
        contracts = self._parts.contracts
        return await self._do(
            "collect", self._deployment.escrow, contracts.encode(contracts.escrow, "collect", provider)
        )

    # ---------------------------------------------------------------------------------------------- reservations

    async def offer_capacity(self, profile_id: Digest, terms: CapacityTerms) -> Mined:
        numbers = (terms.capacity, terms.price, terms.min_periods, terms.max_periods)
        return await self._on_reservations("offer", profile_id, *numbers)

    async def buy_reservation(self, order: ReservationOrder) -> tuple[Digest, Mined]:
        """See the port. Raises: NotEnoughTally, ContractReverted, OutOfCoin, ChainUnavailable (then it may still be
        mined: list the reservations before trying again, or it is bought twice)."""
        from node.chain.transactions import Call

        contracts, to = self._parts.contracts, self._deployment.reservations
        parties = (order.provider, order.profile_id)
        numbers = (order.rate, order.first, order.periods)
        data = contracts.encode(contracts.reservations, "buy", *parties, *numbers, order.session, order.max_cost)
        async with self._allowance:
            await self._need_tally("buy a reservation", order.max_cost)
            await self._allow(to, order.max_cost)
            with self._parts.named("buy a reservation"):
                receipt = await self._sender("a purchase").send(Call("buy a reservation", to, data))
        return contracts.bought_in(receipt["logs"]), _mined(receipt)

    async def transfer_reservation(self, reservation_id: Digest, to: Address) -> Mined:
        return await self._on_reservations("transfer", reservation_id, to)

    async def assign_reservation(self, reservation_id: Digest, session: Address) -> Mined:
        return await self._on_reservations("assign", reservation_id, session)

    async def quit_reservation(self, reservation_id: Digest) -> Mined:
        return await self._on_reservations("quit", reservation_id)

    async def release_reservation(self, reservation_id: Digest) -> Mined:
        return await self._on_reservations("release", reservation_id)

    async def claim_reservation(self, provider: Address, reservation_ids: Sequence[Digest]) -> Mined:
        return await self._on_reservations("claim", provider, list(reservation_ids))

    # ----------------------------------------------------------------------------------------------- settlements

    async def prepare_settlement(
        self, provider: Address, vouchers: Sequence[tuple[Address, Wei, bytes]]
    ) -> PreparedSettlement:
        """See the port. An item whose signature has no valid form is left out: it could not pay.

        A settlement that timed out unmined is replaced by the next one prepared (same nonce, higher fees), so give
        that one its vouchers too; they are cumulative. Raises: ChainUnavailable, ChainError.
        """
        from node.chain.transactions import Call

        sender, contracts = self._sender("a settlement"), self._parts.contracts
        packable = [item for item in vouchers if is_packable(item[2])]
        data = contracts.settle(provider, [(total, signature) for _, total, signature in packable])
        floor = _SETTLE_BASE_GAS + _SETTLE_ITEM_GAS * len(packable)
        with self._parts.named("settle"):
            signed = await sender.prepare(Call("settle", self._deployment.escrow, data, gas_floor=floor))
        return PreparedSettlement(signed.hash, signed.raw, tuple((client, total) for client, total, _ in packable))

    async def send_settlement(self, prepared: PreparedSettlement) -> Settled:
        """See the port. Idempotent, in this process or a later one. Raises: ChainUnavailable (it may still be mined),
        TransactionReplaced (it never will be), ContractReverted, OutOfCoin."""
        from node.chain.transactions import parse_signed

        sender = self._sender("a settlement")
        with self._parts.named("settle"):
            return self._settled(await sender.send_prepared(parse_signed("settle", prepared.raw)))

    async def settlement_result(self, transaction: Digest) -> Settled | None:
        """See the port; a block that is not `confirmations` deep does not count. Raises: ChainError when it failed."""
        receipt = await self._parts.reader.receipt(transaction)
        if receipt is None:
            return None
        if receipt["status"] != 1:
            raise ChainError(
                f"settlement 0x{transaction.hex()} failed in block {receipt['blockNumber']}: its vouchers are unpaid "
                "and due again"
            )
        return self._settled(receipt)

    def _settled(self, receipt: Receipt) -> Settled:
        event = self._parts.contracts.settled_in(receipt["logs"])
        if event is None:
            return Settled(_mined(receipt), Wei(0), Wei(0), ())
        return Settled(_mined(receipt), event.paid, event.fee, tuple(dict(event.claims).items()))

    # -------------------------------------------------------------------------------- for the adapters beside this one

    @property
    def contracts(self) -> Contracts:
        """Raises: ChainUnavailable before `start`."""
        return self._parts.contracts

    @property
    def reader(self) -> Reader:
        """Raises: ChainUnavailable before `start`."""
        return self._parts.reader

    async def call_contract(self, action: str, to: Address, data: bytes) -> Mined:
        """Send calldata from this node's wallet. Raises: ChainUnavailable, ChainError."""
        return await self._do(action, to, data)

    async def pay_contract(self, action: str, to: Address, amount: Wei, data: bytes) -> Mined:
        """The same for a call in which `to` takes TALLY. Raises: NotEnoughTally, ChainUnavailable, ChainError."""
        async with self._allowance:
            await self._need_tally(action, amount)
            await self._allow(to, amount)
            return await self._do(action, to, data)

    # ----------------------------------------------------------------------------------------------------- inside

    @property
    def _parts(self) -> _Parts:
        if self._started is None:
            raise ChainUnavailable("the chain connection is not started")
        return self._started

    def _sender(self, action: str) -> Sender:
        sender = self._parts.sender
        if sender is None:
            raise NoWallet(action)
        return sender

    async def _on_channel(self, function: str, key: ChannelKey) -> Mined:
        contracts = self._parts.contracts
        data = contracts.encode(contracts.escrow, function, key.provider, key.client)
        return await self._do(function, self._deployment.escrow, data)

    async def _on_registry(self, function: str, *arguments: object) -> Mined:
        contracts = self._parts.contracts
        return await self._do(
            function, self._deployment.registry, contracts.encode(contracts.registry, function, *arguments)
        )

    async def _on_reservations(self, function: str, *arguments: object) -> Mined:
        contracts = self._parts.contracts
        data = contracts.encode(contracts.reservations, function, *arguments)
        return await self._do(f"{function} (reservations)", self._deployment.reservations, data)

    async def _do(self, action: str, to: Address, data: bytes) -> Mined:
        from node.chain.transactions import Call

        with self._parts.named(action):
            return _mined(await self._sender(action).send(Call(action, to, data)))

    async def _need_tally(self, action: str, amount: Wei) -> None:
        """The token's own refusal does not say how much is missing."""
        wallet = self._sender(action).address
        has = await self._parts.reader.token_balance(wallet)
        if has < amount:
            raise NotEnoughTally(action, wallet, has, amount)

    async def _allow(self, spender: Address, amount: Wei) -> None:
        wallet, contracts = self._sender("approve").address, self._parts.contracts
        if await self._parts.reader.allowance(wallet, spender) < amount:
            data = contracts.encode(contracts.token, "approve", spender, amount)
            await self._do("approve", self._deployment.token, data)


def _mined(receipt: Receipt) -> Mined:
    gas = int(receipt["gasUsed"])
    transaction = Digest(bytes(receipt["transactionHash"]))
    return Mined(transaction, int(receipt["blockNumber"]), gas, gas * int(receipt["effectiveGasPrice"]))
