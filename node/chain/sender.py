"""Sending transactions from one wallet: nonces, fees, broadcasting, and waiting until they count.

Contract: a transaction that was broadcast is rebroadcast while it is in no block and its nonce is free, so a dropped
or reorganised one comes back; it counts once it is `confirmations` blocks deep, its own block included. One nonce is
handed out at a time, always from what the node says is next, so what others send from the same wallet is respected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any, Final

from node.chain.contracts import checksum
from node.chain.errors import ContractReverted, OutOfCoin, TransactionReplaced
from node.chain.fees import Fees, fees_for, gas_limit_up
from node.chain.rpc import CallReverted, Refusal, Rpc, RpcRefused
from node.chain.transactions import Call, Receipt, Signed, counts, find_receipt, is_known
from node.foreign import tame_py_ecc
from node.ports import ChainError, ChainUnavailable
from protocol.signing import Signer
from protocol.units import Address, Digest

_log = logging.getLogger(__name__)

_NONCE_TRIES: Final = 4
"""How often a nonce that turned out used is replaced by a fresh one: each try means another sender won a race."""

_REPLACED_SIGHTINGS: Final = 3
"""A nonce counts as taken by another transaction only after the node said so this often, `poll_s` apart: behind
a load balancer the receipt may be on the next node already."""

_FIRST_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class SendPolicy:
    """How patient to be with a transaction.

    `confirmations`: depth at which it counts; 1 is being in the newest block.
    `poll_s`: longest pause between looks. `stuck_s`: unmined for this long, its fee is raised (or the gap before it
    filled). `deadline_s`: after this the wait ends in ChainUnavailable; the transaction may still be mined.
    `reservation_s`: how long a prepared, unsent transaction keeps its nonce from others.
    """

    confirmations: int = 1
    poll_s: float = 1.0
    stuck_s: float = 45.0
    deadline_s: float = 300.0
    reservation_s: float = 5.0


class Sender:
    """The only way this node's wallet sends anything. One per wallet and process."""

    def __init__(self, rpc: Rpc, wallet: Signer, chain_id: int, policy: SendPolicy) -> None:
        self._rpc, self._wallet, self._chain_id, self._policy = rpc, wallet, chain_id, policy
        self._lock = asyncio.Lock()
        self._in_flight: dict[int, Signed] = {}
        self._reserved: Signed | None = None
        self._released = asyncio.Event()
        self._stuck: Signed | None = None

    @property
    def address(self) -> Address:
        return self._wallet.address

    async def send(self, call: Call) -> Receipt:
        """Sign, broadcast and wait.

        Raises: ContractReverted (before sending, as far as can be seen), OutOfCoin, TransactionReplaced,
        ChainUnavailable (then it may still be mined: look before trying again).
        """
        async with self._lock:
            await self._end_reservation()
            signed = await self._sign_and_broadcast(call)
            self._in_flight[signed.nonce] = signed
        try:
            return await self._wait(signed, may_bump=True)
        finally:
            self._in_flight.pop(signed.nonce, None)

    async def prepare(self, call: Call) -> Signed:
        """Sign with the next nonce, and keep that nonce for `reservation_s`; nothing is broadcast.

        A prepared transaction that timed out unmined is replaced: same nonce, higher fees.
        Raises: ContractReverted, ChainUnavailable.
        """
        async with self._lock:
            await self._end_reservation()
            gas = await self._gas(call)
            stuck = await self._still_stuck()
            fees = await self._fees()
            if stuck is None:
                signed = self._sign(call, await self._next_nonce(), fees, gas)
            else:
                signed = self._sign(call, stuck.nonce, fees.at_least(stuck.fees.bumped_up()), gas)
            self._reserved = signed
            self._released.clear()
            return signed

    async def send_prepared(self, signed: Signed) -> Receipt:
        """Broadcast what `prepare` signed, in this process or an earlier one, and wait. Idempotent.

        Raises: TransactionReplaced, OutOfCoin, ChainUnavailable (then it may still be mined).
        """
        rival = self._in_flight.get(signed.nonce)
        if rival is not None and rival.hash != signed.hash:
            raise TransactionReplaced(signed.hash, signed.nonce)
        self._in_flight[signed.nonce] = signed
        try:
            try:
                if not await self._broadcast(signed):
                    raise TransactionReplaced(signed.hash, signed.nonce)
            finally:
                self._release(signed)
            return await self._wait(signed, may_bump=False)
        except ChainUnavailable:
            self._stuck = signed
            raise
        finally:
            self._in_flight.pop(signed.nonce, None)

    # ------------------------------------------------------------------------------------------------- nonces, fees

    async def _next_nonce(self) -> int:
        """The node's pending count, past what this process has in flight and the node may not have seen yet."""
        nonce = await self._count("pending")
        while nonce in self._in_flight:
            nonce += 1
        return nonce

    async def _count(self, block: Any) -> int:
        return int(await self._rpc.read(lambda w3: w3.eth.get_transaction_count(checksum(self.address), block)))

    async def _fees(self) -> Fees:
        block = await self._rpc.read(lambda w3: w3.eth.get_block("latest"))
        if "baseFeePerGas" not in block:
            raise ChainError(f"chain {self._chain_id} has no EIP-1559 fees, which this node needs")
        tip = await self._rpc.read(lambda w3: w3.eth.max_priority_fee)
        return fees_for(int(block["baseFeePerGas"]), int(tip))

    async def _gas(self, call: Call) -> int:
        """Gas limit. The estimate is made on the pending block, so it sees what this wallet sent before."""
        body = self._body(call)
        estimate = await self._rpc.read(lambda w3: w3.eth.estimate_gas(body, "pending"))
        return max(gas_limit_up(int(estimate)), call.gas_floor)

    def _body(self, call: Call) -> Any:
        """The call as eth_call and eth_estimateGas take it."""
        body: dict[str, Any] = {"from": checksum(self.address), "data": "0x" + call.data.hex(), "value": call.value}
        if call.to is not None:
            body["to"] = checksum(call.to)
        return body

    def _sign(self, call: Call, nonce: int, fees: Fees, gas: int) -> Signed:
        tame_py_ecc()
        from eth_account import Account

        body: dict[str, Any] = {
            "type": 2,
            "chainId": self._chain_id,
            "nonce": nonce,
            "maxFeePerGas": fees.cap,
            "maxPriorityFeePerGas": fees.tip,
            "gas": gas,
            "to": b"" if call.to is None else call.to,
            "value": call.value,
            "data": call.data,
        }
        done = Account.sign_transaction(body, self._wallet.secret)
        return Signed(Digest(bytes(done.hash)), bytes(done.raw_transaction), nonce, fees, gas, call)

    async def _end_reservation(self) -> None:
        """Let a prepared transaction be sent first; if it is not in time, its nonce is up for use again."""
        if self._reserved is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._policy.reservation_s):
                    await self._released.wait()
            self._reserved = None

    def _release(self, signed: Signed) -> None:
        if self._reserved is not None and self._reserved.hash == signed.hash:
            self._released.set()

    async def _still_stuck(self) -> Signed | None:
        if self._stuck is not None and await self._count("latest") > self._stuck.nonce:
            self._stuck = None
        return None if self._stuck is None or self._stuck.nonce in self._in_flight else self._stuck

    # -------------------------------------------------------------------------------------------------- broadcasting

    async def _sign_and_broadcast(self, call: Call) -> Signed:
        gas = await self._gas(call)
        for _ in range(_NONCE_TRIES):
            signed = self._sign(call, await self._next_nonce(), await self._fees(), gas)
            if await self._broadcast(signed, first_time=True):
                return signed
        raise ChainUnavailable(f"{call.action}: other senders keep taking this wallet's nonces; nothing was sent")

    async def _broadcast(self, signed: Signed, *, first_time: bool = False) -> bool:
        """Hand it to the node. False: the nonce is another transaction's.

        `first_time`: it never left this process. Then a node that knows it already has it from another process of
        this wallet, which wanted the very same thing at the same moment: that one is not ours to count.
        Raises: OutOfCoin, RpcRefused, ChainUnavailable (after the tries a read gets; it may have arrived).
        """
        limits = self._rpc.limits
        for attempt in range(limits.attempts):
            try:
                await self._rpc.once(lambda w3: w3.eth.send_raw_transaction(signed.raw))
                return True
            except ChainUnavailable:
                first_time = False  # it may have arrived all the same
                if attempt == limits.attempts - 1:
                    raise
                await self._rpc.clock.sleep(limits.pause(attempt))
            except RpcRefused as refused:
                if refused.kind is Refusal.NO_COIN:
                    raise OutOfCoin(self.address) from refused
                if refused.kind not in (Refusal.KNOWN, Refusal.NONCE_USED, Refusal.UNDERPRICED):
                    raise
                return not first_time and (refused.kind is Refusal.KNOWN or await is_known(self._rpc, signed.hash))
        return False

    # ------------------------------------------------------------------------------------------------------ waiting

    async def _wait(self, signed: Signed, *, may_bump: bool) -> Receipt:
        receipt = await _Wait(self, signed, may_bump=may_bump).until_counted()
        if receipt["status"] != 1:
            raise await self._why_reverted(signed.call, receipt)
        return receipt

    async def _why_reverted(self, call: Call, receipt: Receipt) -> ChainError:
        """Run it again on the block it failed in; the reason stands in no receipt."""
        body = self._body(call)
        try:
            await self._rpc.read(lambda w3: w3.eth.call(body, int(receipt["blockNumber"])))
        except CallReverted as reverted:
            return reverted
        except ChainUnavailable:
            pass
        return ContractReverted(call.action, "Error", {"reason": "reverted in its block, for no reason left to see"})


class _Wait:
    """One wait for one nonce: the transaction, and its own replacements at higher fees."""

    def __init__(self, sender: Sender, signed: Signed, *, may_bump: bool) -> None:
        self._sender, self._versions, self._may_bump = sender, [signed], may_bump
        self._clock, self._policy = sender._rpc.clock, sender._policy
        self._moved_at = self._clock.monotonic()
        self._taken_sightings = 0

    async def until_counted(self) -> Receipt:
        """Raises: TransactionReplaced, ChainUnavailable at the deadline."""
        deadline = self._clock.monotonic() + self._policy.deadline_s
        pause, last = _FIRST_POLL_S, "it is in no block"
        while True:
            try:
                receipt = await self._look()
                if receipt is not None:
                    return receipt
            except (ChainUnavailable, RpcRefused) as exc:
                last = str(exc)
            if self._clock.monotonic() >= deadline:
                newest = self._versions[-1]
                raise ChainUnavailable(
                    f"{newest.call.action}: transaction 0x{newest.hash.hex()} did not count within "
                    f"{self._policy.deadline_s:g} s ({last}); it may still be mined, look before sending it anew"
                )
            pause = self._policy.poll_s if self._taken_sightings else min(pause * 2, self._policy.poll_s)
            await self._clock.sleep(pause)

    async def _look(self) -> Receipt | None:
        sender, newest = self._sender, self._versions[-1]
        for version in reversed(self._versions):
            receipt = await find_receipt(sender._rpc, version.hash)
            if receipt is not None:
                self._taken_sightings = 0
                return receipt if await counts(sender._rpc, receipt, self._policy.confirmations) else None
        mined = await sender._count("latest")
        if mined > newest.nonce:
            self._taken_sightings += 1
            if self._taken_sightings >= _REPLACED_SIGHTINGS:
                raise TransactionReplaced(self._versions[0].hash, newest.nonce)
            return None
        self._taken_sightings = 0
        if not await is_known(sender._rpc, newest.hash):
            _log.info("rebroadcasting dropped transaction 0x%s", newest.hash.hex())
            await sender._broadcast(newest)
        elif self._clock.monotonic() - self._moved_at >= self._policy.stuck_s:
            self._moved_at = self._clock.monotonic()
            await self._unstick(newest, mined)
        return None

    async def _unstick(self, newest: Signed, mined: int) -> None:
        """Raise the fee, or fill the gap that keeps it from being next."""
        sender = self._sender
        if mined < newest.nonce:
            if mined not in sender._in_flight:
                filler = Call("filling a nonce gap", sender.address, gas_floor=21_000)
                fees = (await sender._fees()).at_least(newest.fees.bumped_up())
                _log.warning("nonce %d is missing before %d: filling the gap", mined, newest.nonce)
                await sender._broadcast(sender._sign(filler, mined, fees, filler.gas_floor))
        elif self._may_bump:
            fees = (await sender._fees()).at_least(newest.fees.bumped_up())
            bumped = sender._sign(newest.call, newest.nonce, fees, newest.gas)
            _log.info("transaction 0x%s is stuck: replacing it at a higher fee", newest.hash.hex())
            if await sender._broadcast(bumped):
                self._versions.append(bumped)
                sender._in_flight[newest.nonce] = bumped
