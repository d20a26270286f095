"""Nonces, fees and waiting, against Anvil's pool."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from node.chain import ChainOptions, Web3Chain
from node.chain.errors import ContractReverted, TransactionReplaced
from node.chain.fees import Fees, fees_for, gas_limit_up
from node.ports import ChainUnavailable, Mined, PreparedSettlement
from protocol.signing import Signer
from protocol.units import Address, Wei
from tests.node.chain.helpers import eventually, pooled, send_as, session, voucher
from tests.twins.chain_lab import RICH_TALLY, AnvilLab, secret_of

SOMEBODY = secret_of(500).address
QUICK = ChainOptions(poll_s=0.05, stuck_s=0.2, deadline_s=10, reservation_s=0.2)
HASTY = ChainOptions(poll_s=0.05, stuck_s=60, deadline_s=0.4, reservation_s=0.2)


async def test_a_dropped_transaction_is_broadcast_again(anvil_lab: AnvilLab) -> None:
    wallet = await anvil_lab.account()
    node = await anvil_lab.node_with(wallet, QUICK)
    await anvil_lab.automine(False)
    sending = asyncio.create_task(node.transfer(SOMEBODY, Wei(5)))
    (first,) = await pooled(anvil_lab, wallet.address)
    await anvil_lab.automine(True)  # takes effect with the next transaction to arrive
    await anvil_lab.drop(first)
    mined = await sending
    assert mined.transaction == first
    assert await node.token_balance(SOMEBODY) == 5


async def test_a_stuck_transaction_is_replaced_at_a_higher_fee_and_counts_once(anvil_lab: AnvilLab) -> None:
    wallet = await anvil_lab.account()
    node = await anvil_lab.node_with(wallet, QUICK)
    await anvil_lab.automine(False)
    sending = asyncio.create_task(node.transfer(SOMEBODY, Wei(5)))
    (first,) = await pooled(anvil_lab, wallet.address)
    (second,) = await pooled(anvil_lab, wallet.address, other_than=first)
    await anvil_lab.mine()
    mined = await sending
    assert mined.transaction != first
    assert second != first
    assert await node.token_balance(wallet.address) == RICH_TALLY - 5


async def test_a_gap_that_another_sender_left_is_filled(anvil_lab: AnvilLab) -> None:
    wallet = await anvil_lab.account()
    node = await anvil_lab.node_with(wallet, QUICK)
    await anvil_lab.automine(False)
    lost = await send_as(anvil_lab, wallet.address, SOMEBODY, value="0x1")
    sending = asyncio.create_task(node.transfer(SOMEBODY, Wei(5)))
    hashes = await pooled(anvil_lab, wallet.address, count=2)
    await anvil_lab.automine(True)
    await anvil_lab.drop(lost)
    assert (await sending).transaction == hashes[1]
    assert await node.token_balance(SOMEBODY) == 5


async def test_several_processes_with_one_wallet_never_count_one_transaction_twice(anvil_lab: AnvilLab) -> None:
    wallet = await anvil_lab.account()
    nodes = [await anvil_lab.node_with(wallet, QUICK) for _ in range(3)]
    sends = (node.transfer(SOMEBODY, Wei(1)) for node in nodes for _ in range(4))
    results = await asyncio.gather(*sends, return_exceptions=True)
    mined = [result.transaction for result in results if isinstance(result, Mined)]
    lost = [result for result in results if not isinstance(result, Mined)]
    assert len(set(mined)) == len(mined) > 3
    assert all(isinstance(error, TransactionReplaced | ChainUnavailable) for error in lost)
    assert await nodes[0].token_balance(SOMEBODY) == len(mined)


async def test_a_prepared_settlement_keeps_its_nonce_until_it_is_sent(anvil_lab: AnvilLab) -> None:
    earner = await earner_with(anvil_lab, ChainOptions(poll_s=0.05, reservation_s=20))
    prepared = await earner.prepare(60)
    transfer = asyncio.create_task(earner.node.transfer(SOMEBODY, Wei(1)))
    settled = await earner.node.send_settlement(prepared)
    assert settled.paid == 60
    assert (await transfer).block > settled.mined.block


async def test_a_prepared_settlement_that_is_never_sent_leaves_no_gap(anvil_lab: AnvilLab) -> None:
    earner = await earner_with(anvil_lab, QUICK)
    prepared = await earner.prepare(60)
    await earner.node.transfer(SOMEBODY, Wei(1))
    with pytest.raises(TransactionReplaced):
        await earner.node.send_settlement(prepared)


async def test_an_abandoned_settlement_does_not_outbid_what_took_its_nonce(anvil_lab: AnvilLab) -> None:
    earner = await earner_with(anvil_lab, QUICK)
    prepared = await earner.prepare(60)
    await anvil_lab.automine(False)
    transfer = asyncio.create_task(earner.node.transfer(SOMEBODY, Wei(1)))
    await pooled(anvil_lab, earner.address)
    with pytest.raises(TransactionReplaced):
        await earner.node.send_settlement(prepared)
    await anvil_lab.automine(True)
    await anvil_lab.mine()
    await transfer


async def test_a_stuck_settlement_is_replaced_by_the_next_one_prepared(anvil_lab: AnvilLab) -> None:
    earner = await earner_with(anvil_lab, HASTY)
    await anvil_lab.automine(False)
    first = await earner.prepare(60)
    with pytest.raises(ChainUnavailable, match=first.transaction.hex()):
        await earner.node.send_settlement(first)
    second = await earner.prepare(75)
    sending = asyncio.create_task(earner.node.send_settlement(second))
    await pooled(anvil_lab, earner.address, other_than=first.transaction)
    await anvil_lab.mine()
    assert (await sending).paid == 75
    assert await earner.node.settlement_result(first.transaction) is None
    with pytest.raises(TransactionReplaced):
        await earner.node.send_settlement(first)
    assert await earner.node.earned(earner.address) == 75 - 9


async def test_a_stuck_settlement_that_is_mined_after_all_is_found(anvil_lab: AnvilLab) -> None:
    earner = await earner_with(anvil_lab, HASTY)
    await anvil_lab.automine(False)
    first = await earner.prepare(60)
    with pytest.raises(ChainUnavailable):
        await earner.node.send_settlement(first)
    await anvil_lab.mine()
    result = await earner.node.settlement_result(first.transaction)
    assert result is not None and result.paid == 60
    await anvil_lab.automine(True)
    second = await earner.node.send_settlement(await earner.prepare(75))
    assert second.paid == 15


async def test_a_settlement_has_gas_for_items_that_only_pay_when_it_is_mined(anvil_lab: AnvilLab) -> None:
    earner, user = await anvil_lab.account(), await anvil_lab.account()
    node, client = await anvil_lab.node(earner), await anvil_lab.node(user)
    keys = [session(i) for i in range(6)]
    items = [voucher(anvil_lab.domain, key, earner.address, 20) for key in keys]
    for key in keys:
        await client.open_channel(earner.address, key.secret, Wei(10))
    await node.send_settlement(await node.prepare_settlement(earner.address, items))
    prepared = await node.prepare_settlement(earner.address, items)  # would pay nothing now
    for key in keys:
        await client.open_channel(earner.address, key.secret, Wei(10))
    assert (await node.send_settlement(prepared)).paid == 60


async def test_what_reverts_in_its_block_is_reported_by_the_contract_s_name_for_it(anvil_lab: AnvilLab) -> None:
    victim, thief = await anvil_lab.account(), await anvil_lab.account()
    node, token = await anvil_lab.node(victim), anvil_lab.deployment.token
    word = {who.address: who.address.rjust(32, b"\0").hex() for who in (victim, thief)}
    await send_as(anvil_lab, victim.address, token, "0x095ea7b3" + word[thief.address] + "f" * 64)
    await anvil_lab.automine(False)
    sending = asyncio.create_task(node.transfer(SOMEBODY, Wei(RICH_TALLY)))
    await pooled(anvil_lab, victim.address)
    take = "0x23b872dd" + word[victim.address] + word[thief.address] + RICH_TALLY.to_bytes(32, "big").hex()
    await send_as(anvil_lab, thief.address, token, take, maxPriorityFeePerGas=hex(10**11), maxFeePerGas=hex(10**12))
    await anvil_lab.mine()
    with pytest.raises(ContractReverted) as reverted:
        await sending
    assert reverted.value.name == "ERC20InsufficientBalance"
    assert reverted.value.arguments == {"sender": victim.address, "balance": 0, "needed": RICH_TALLY}


async def test_a_transaction_reorganised_away_is_back_before_it_counts(anvil_lab: AnvilLab) -> None:
    wallet = await anvil_lab.account()
    await anvil_lab.mine(3)
    node = await anvil_lab.node(wallet, confirmations=3)
    sending = asyncio.create_task(node.transfer(SOMEBODY, Wei(5)))

    async def arrived() -> int | None:
        return await node.token_balance(SOMEBODY) or None

    await eventually(arrived)
    await anvil_lab.reorg(1)
    await eventually(arrived)
    assert not sending.done()
    await anvil_lab.mine(2)
    mined = await sending
    assert (await node.head()).number - mined.block == 2


def test_fees_leave_room_for_a_rising_base_fee_and_replacements_outbid() -> None:
    fees = fees_for(base_fee=100, tip=7)
    assert fees == Fees(cap=207, tip=7)
    bumped = fees.bumped_up()
    assert bumped.cap * 100 >= fees.cap * 110 and bumped.tip * 100 >= fees.tip * 110
    assert Fees(1, 9).at_least(Fees(5, 2)) == Fees(5, 9)
    assert gas_limit_up(100_001) == 120_002


@dataclass(frozen=True)
class Earner:
    """A provider's node with one channel of 100 wei."""

    node: Web3Chain
    address: Address
    key: Signer

    async def prepare(self, cumulative: int) -> PreparedSettlement:
        item = voucher(self.node.domain, self.key, self.address, cumulative)
        return await self.node.prepare_settlement(self.address, [item])


async def earner_with(lab: AnvilLab, options: ChainOptions) -> Earner:
    wallet, user, key = await lab.account(), await lab.account(), session(1)
    await (await lab.node(user)).open_channel(wallet.address, key.secret, Wei(100))
    return Earner(await lab.node_with(wallet, options), wallet.address, key)
