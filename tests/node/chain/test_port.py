"""The Chain port's contract, on the twin and on the contracts themselves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from incentives.ledger import ChannelKey
from node.chain.errors import (
    ContractReverted,
    NotEnoughTally,
    NoWallet,
    OutOfCoin,
    TransactionReplaced,
)
from node.ports import ChainUnavailable
from protocol.eip712 import digest
from protocol.units import WEI_PER_TALLY, ZERO_ADDRESS, ZERO_DIGEST, Digest, Wei
from tests.node.chain.helpers import balanced, session, settle, tariff, voucher, watching
from tests.twins.chain_lab import LAB_OPTIONS, RICH_TALLY, ChainLab, secret_of


async def test_a_channel_is_opened_topped_up_and_read(lab: ChainLab) -> None:
    user, provider, key = await lab.account(), secret_of(99).address, session(1)
    node = await lab.node(user)
    channel = ChannelKey(provider, key.address)
    assert await node.slot(channel) is None
    opened = await node.open_channel(provider, key.secret, Wei(1_000))
    seen = await node.slot(channel)
    assert seen is not None
    assert (seen.owner, seen.deposit, seen.claimed, seen.exit_at) == (user.address, 1_000, 0, 0)
    assert seen.block == opened.block == (await node.head()).number
    assert opened.gas > 0 and opened.gas_wei > opened.gas
    await node.open_channel(provider, key.secret, Wei(500))
    seen = await node.slot(channel)
    assert seen is not None and seen.deposit == 1_500
    assert await node.token_balance(user.address) == RICH_TALLY - 1_500
    await balanced(lab, node, [channel], [provider])


async def test_nobody_takes_a_channel_that_is_another_s(lab: ChainLab) -> None:
    provider, key = secret_of(99).address, session(1)
    first, second = await lab.account(), await lab.account()
    await (await lab.node(first)).open_channel(provider, key.secret, Wei(10))
    with pytest.raises(ContractReverted) as refused:
        await (await lab.node(second)).open_channel(provider, key.secret, Wei(10))
    assert refused.value.name == "ChannelTaken"
    assert refused.value.arguments == {"provider": provider, "signer": key.address, "owner": first.address}


async def test_too_little_tally_or_coin_is_said_and_nothing_moves(lab: ChainLab) -> None:
    provider, key = secret_of(99).address, session(1)
    poor, dry = await lab.account(tally=5), await lab.account(coin=0)
    with pytest.raises(NotEnoughTally) as short:
        await (await lab.node(poor)).open_channel(provider, key.secret, Wei(6))
    assert (short.value.has, short.value.needs) == (5, 6)
    node = await lab.node(dry)
    with pytest.raises(OutOfCoin):
        await node.transfer(provider, Wei(1))
    assert await node.slot(ChannelKey(provider, key.address)) is None
    assert await node.token_balance(dry.address) == RICH_TALLY
    assert await node.coin_balance(dry.address) == 0


async def test_a_batch_pays_exactly_and_skips_what_is_stale_forged_or_overdrawn(lab: ChainLab) -> None:
    user, earner = await lab.account(), await lab.account()
    provider, keys = earner.address, [session(i) for i in range(5)]
    client, node = await lab.node(user), await lab.node(earner)
    channels = [ChannelKey(provider, key.address) for key in keys]
    for key in keys:
        await client.open_channel(provider, key.secret, Wei(1_001))
    assert await settle(node, provider, voucher(lab.domain, keys[0], provider, 700)) == (700, 84)

    stale = voucher(lab.domain, keys[0], provider, 700)
    overdrawn = voucher(lab.domain, keys[1], provider, 5_000)
    good = voucher(lab.domain, keys[2], provider, 33)
    forged = (keys[3].address, Wei(1_001), voucher(lab.domain, session(77), provider, 1_001)[2])
    altered = (keys[4].address, Wei(1_001), voucher(lab.domain, keys[4], provider, 1)[2])
    other = voucher(lab.domain, keys[4], user.address, 500)  # signed for somebody else
    malformed = (keys[4].address, Wei(900), b"\x00" * 64)
    prepared = await node.prepare_settlement(provider, [stale, overdrawn, good, forged, altered, other, malformed])
    settled = await node.send_settlement(prepared)

    assert (settled.paid, settled.fee) == (1_001 + 33, (1_001 + 33) * 12 // 100)
    assert dict(settled.claimed) == {keys[1].address: 1_001, keys[2].address: 33}
    slots = [await node.slot(channel) for channel in channels]
    assert [slot.claimed for slot in slots if slot] == [700, 1_001, 33, 0, 0]
    fee = 84 + 124
    assert await node.earned(provider) == 1_734 - fee
    assert await lab.fees_pending() == fee
    await balanced(lab, node, channels, [provider])
    await node.collect(provider)
    assert await node.token_balance(provider) == RICH_TALLY + 1_734 - fee
    assert await node.earned(provider) == 0
    await balanced(lab, node, channels, [provider])


async def test_an_overdrawn_voucher_is_good_for_what_is_deposited_later(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    client, node = await lab.node(user), await lab.node(earner)
    await client.open_channel(earner.address, key.secret, Wei(100))
    item = voucher(lab.domain, key, earner.address, 250)
    assert (await settle(node, earner.address, item))[0] == 100
    await client.open_channel(earner.address, key.secret, Wei(100))
    assert (await settle(node, earner.address, item))[0] == 100
    assert (await settle(node, earner.address, item))[0] == 0


async def test_anybody_may_settle_and_collect_and_the_provider_is_paid(lab: ChainLab) -> None:
    user, stranger, provider, key = await lab.account(), await lab.account(), secret_of(99).address, session(1)
    client, node = await lab.node(user), await lab.node(stranger)
    await client.open_channel(provider, key.secret, Wei(100))
    assert await settle(node, provider, voucher(lab.domain, key, provider, 100)) == (100, 12)
    await node.collect(provider)
    assert await node.token_balance(provider) == 88
    assert await node.token_balance(stranger.address) == RICH_TALLY


async def test_a_settlement_of_two_vouchers_of_one_channel_reports_its_last_total(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    await (await lab.node(user)).open_channel(earner.address, key.secret, Wei(100))
    node = await lab.node(earner)
    items = [voucher(lab.domain, key, earner.address, n) for n in (10, 40)]
    settled = await node.send_settlement(await node.prepare_settlement(earner.address, items))
    assert (settled.paid, settled.claimed) == (40, ((key.address, 40),))


async def test_a_prepared_settlement_survives_a_crash_and_is_mined_once(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    await (await lab.node(user)).open_channel(earner.address, key.secret, Wei(100))
    before = await lab.node(earner)
    prepared = await before.prepare_settlement(earner.address, [voucher(lab.domain, key, earner.address, 60)])
    assert prepared.vouchers == ((key.address, 60),)
    assert await before.settlement_result(prepared.transaction) is None
    await before.stop()

    after = await lab.node(earner)
    assert await after.settlement_result(prepared.transaction) is None
    settled = await after.send_settlement(prepared)
    assert settled.mined.transaction == prepared.transaction
    assert settled.paid == 60
    assert await after.send_settlement(prepared) == settled
    assert await after.settlement_result(prepared.transaction) == settled
    assert await after.earned(earner.address) == 60 - 7


async def test_sending_the_same_settlement_twice_at_once_mines_it_once(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    await (await lab.node(user)).open_channel(earner.address, key.secret, Wei(100))
    one, two = await lab.node(earner), await lab.node(earner)
    prepared = await one.prepare_settlement(earner.address, [voucher(lab.domain, key, earner.address, 60)])
    results = await asyncio.gather(one.send_settlement(prepared), two.send_settlement(prepared))
    assert results[0] == results[1]


async def test_a_settlement_whose_nonce_went_to_another_is_replaced(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    await (await lab.node(user)).open_channel(earner.address, key.secret, Wei(100))
    node, rival = await lab.node(earner), await lab.node(earner)
    item = voucher(lab.domain, key, earner.address, 60)
    prepared = await node.prepare_settlement(earner.address, [item])
    await rival.transfer(user.address, Wei(1))
    with pytest.raises(TransactionReplaced):
        await node.send_settlement(prepared)
    assert await node.settlement_result(prepared.transaction) is None
    assert (await settle(node, earner.address, item))[0] == 60


async def test_a_settlement_lost_in_a_reorganisation_is_sent_again(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    await (await lab.node(user)).open_channel(earner.address, key.secret, Wei(100))
    await lab.mine()
    node = await lab.node(earner)
    prepared = await node.prepare_settlement(earner.address, [voucher(lab.domain, key, earner.address, 60)])
    await node.send_settlement(prepared)
    await lab.reorg(1)
    assert await node.settlement_result(prepared.transaction) is None
    assert await node.earned(earner.address) == 0
    assert (await node.send_settlement(prepared)).paid == 60


async def test_an_exit_waits_its_delay_and_returns_what_no_voucher_claimed(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    client, node = await lab.node(user), await lab.node(earner)
    channel = ChannelKey(earner.address, key.address)
    await client.open_channel(earner.address, key.secret, Wei(100))
    with pytest.raises(ContractReverted, match="NoExitRequested"):
        await client.exit(channel)
    with pytest.raises(ContractReverted, match="NotChannelOwner"):
        await node.request_exit(channel)
    await client.request_exit(channel)
    seen = await client.slot(channel)
    assert seen is not None
    assert seen.exit_at == (await client.head()).timestamp + LAB_OPTIONS.exit_delay
    with pytest.raises(ContractReverted) as early:
        await client.exit(channel)
    assert (early.value.name, early.value.arguments["exitAt"]) == ("ExitTooEarly", seen.exit_at)
    with pytest.raises(ContractReverted, match="ExitPending"):
        await client.open_channel(earner.address, key.secret, Wei(1))
    assert (await settle(node, earner.address, voucher(lab.domain, key, earner.address, 30)))[0] == 30
    await lab.advance(LAB_OPTIONS.exit_delay)
    await client.exit(channel)
    assert await client.token_balance(user.address) == RICH_TALLY - 30
    seen = await client.slot(channel)
    assert seen is not None
    assert (seen.owner, seen.deposit, seen.claimed, seen.exit_at) == (user.address, 30, 30, 0)
    await balanced(lab, node, [channel], [earner.address])
    await client.open_channel(earner.address, key.secret, Wei(70))
    assert (await settle(node, earner.address, voucher(lab.domain, key, earner.address, 30)))[0] == 0
    assert (await settle(node, earner.address, voucher(lab.domain, key, earner.address, 31)))[0] == 1


async def test_a_provider_registers_once_rotates_its_key_and_raises_its_stake(lab: ChainLab) -> None:
    wallet = await lab.account()
    node, first, second = await lab.node(wallet), session(11), session(12)
    assert await node.provider(wallet.address) is None
    assert await node.provider_by_node_key(first.address) is None
    with pytest.raises(ContractReverted, match="StakeBelowMinimum"):
        await node.register_provider(first.secret, Wei(1))
    stake = Wei(LAB_OPTIONS.min_stake)
    for _ in range(2):
        await node.register_provider(first.secret, stake)
    record = await node.provider(wallet.address)
    assert record is not None
    assert (record.wallet, record.node_key, record.stake) == (wallet.address, first.address, stake)
    assert await node.provider_by_node_key(first.address) == record
    assert await node.token_balance(wallet.address) == RICH_TALLY - stake
    await node.register_provider(second.secret, Wei(stake + 5))
    record = await node.provider_by_node_key(second.address)
    assert record is not None and record.stake == stake + 5
    assert await node.provider_by_node_key(first.address) is None
    other = await lab.node(await lab.account())
    with pytest.raises(ContractReverted, match="NodeKeyTaken"):
        await other.register_provider(first.secret, stake)


async def test_stake_leaves_after_the_unbonding_delay_and_no_sooner(lab: ChainLab) -> None:
    wallet = await lab.account()
    node, keys = await lab.node(wallet), [session(1), session(2)]
    await node.register_provider(keys[0].secret, Wei(300 * WEI_PER_TALLY))
    await node.register_provider(keys[1].secret, Wei(300 * WEI_PER_TALLY))
    assert [await node.key_holder(key.address) for key in keys] == [wallet.address] * 2, (
        "a retired key is still its own"
    )
    assert await node.key_holder(session(3).address) is None
    before = await node.token_balance(wallet.address)
    for amount, name in ((0, "ZeroAmount"), (301, "InsufficientStake"), (250, "StakeBelowMinimum")):
        with pytest.raises(ContractReverted) as refused:
            await node.request_unbond(Wei(amount * WEI_PER_TALLY))
        assert refused.value.name == name
    await node.request_unbond(Wei(200 * WEI_PER_TALLY))
    stake = await node.stake_of(wallet.address)
    assert (stake.active, stake.unbonding) == (100 * WEI_PER_TALLY, 200 * WEI_PER_TALLY)
    assert stake.release_at == (await node.head()).timestamp + LAB_OPTIONS.unbond_delay
    with pytest.raises(ContractReverted, match="StillBonded"):
        await node.withdraw_stake()
    await lab.advance(LAB_OPTIONS.unbond_delay)
    await node.withdraw_stake()
    assert await node.token_balance(wallet.address) == before + 200 * WEI_PER_TALLY
    with pytest.raises(ContractReverted, match="NothingUnbonding"):
        await node.withdraw_stake()


async def test_a_tariff_is_in_the_log_a_full_epoch_ahead_or_not_at_all(lab: ChainLab) -> None:
    wallet, key = await lab.account(), session(11)
    node = await lab.node(wallet)
    epoch = await node.epoch_seconds()
    assert epoch == LAB_OPTIONS.epoch_seconds
    start = (await node.head()).timestamp + 10 * epoch
    sheet = tariff(wallet.address, 1, start)
    with pytest.raises(ContractReverted, match="NotRegistered"):
        await node.log_tariff(sheet, key.sign(lab.domain, sheet))
    await node.register_provider(key.secret, Wei(LAB_OPTIONS.min_stake))
    early = replace(sheet, valid_from=(await node.head()).timestamp + epoch - 5)
    with pytest.raises(ContractReverted, match="TariffTooSoon"):
        await node.log_tariff(early, key.sign(lab.domain, early))
    with pytest.raises(ContractReverted, match="BadSignature"):
        await node.log_tariff(sheet, wallet.sign(lab.domain, sheet))
    await node.log_tariff(sheet, key.sign(lab.domain, sheet))
    record = await node.tariff(digest(lab.domain, sheet))
    assert record is not None
    assert (record.provider, record.valid_from, record.valid_until) == (wallet.address, start, start + 3600)
    with pytest.raises(ContractReverted, match="SequenceNotAbove"):
        await node.log_tariff(sheet, key.sign(lab.domain, sheet))
    assert await node.tariff(ZERO_DIGEST) is None


async def test_the_last_tariff_sequence_is_counted_per_wallet_and_profile(lab: ChainLab) -> None:
    wallet, key = await lab.account(), session(11)
    node = await lab.node(wallet)
    await node.register_provider(key.secret, Wei(LAB_OPTIONS.min_stake))
    sheet = tariff(wallet.address, 3, (await node.head()).timestamp + 10 * LAB_OPTIONS.epoch_seconds)
    assert await node.last_sequence(wallet.address, sheet.profile_id) == 0
    await node.log_tariff(sheet, key.sign(lab.domain, sheet))
    assert await node.last_sequence(wallet.address, sheet.profile_id) == 3
    assert await node.last_sequence(wallet.address, ZERO_DIGEST) == 0
    assert await node.last_sequence(key.address, sheet.profile_id) == 0


async def test_slots_are_reported_as_they_open_and_change(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    client, node = await lab.node(user), await lab.node(earner)
    channel = ChannelKey(earner.address, key.address)
    await client.open_channel(earner.address, key.secret, Wei(100))  # before anybody watches
    await client.open_channel(user.address, session(2).secret, Wei(100))  # another provider's
    async with watching(node, earner.address) as reports:
        assert (await reports.until(lambda s: s.deposit == 100)).owner == user.address
        await settle(node, earner.address, voucher(lab.domain, key, earner.address, 30))
        await reports.until(lambda s: s.claimed == 30)
        await client.request_exit(channel)
        await reports.until(lambda s: s.exit_at > 0)
        await client.open_channel(earner.address, session(3).secret, Wei(7))
        await reports.until(lambda s: s.deposit == 7)
    assert {seen.key.provider for seen in reports.all} == {earner.address}
    assert len(reports.all) == 4  # and nothing twice


async def test_a_slot_that_vanishes_in_a_reorganisation_is_reported_gone(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    client, node = await lab.node(user), await lab.node(earner)
    kept = ChannelKey(earner.address, session(2).address)
    await client.open_channel(earner.address, session(2).secret, Wei(50))
    await lab.mine(3)
    async with watching(node, earner.address) as reports:
        await reports.until(lambda s: s.deposit == 50)
        opened = await client.open_channel(earner.address, key.secret, Wei(100))
        await reports.until(lambda s: s.deposit == 100)
        await lab.reorg((await node.head()).number - opened.block + 1)
        gone = await reports.until(lambda s: s.owner == ZERO_ADDRESS)
        assert (gone.key, gone.deposit, gone.claimed, gone.exit_at) == (
            ChannelKey(earner.address, key.address),
            0,
            0,
            0,
        )
        assert await node.slot(gone.key) is None
        assert reports.latest()[kept].deposit == 50
        await client.open_channel(earner.address, key.secret, Wei(40))
        await reports.until(lambda s: s.deposit == 40)


async def test_nothing_counts_before_it_is_deep_enough(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    client, careful = await lab.node(user), await lab.node(earner, confirmations=3)
    channel = ChannelKey(earner.address, key.address)
    async with watching(careful, earner.address) as reports:
        opened = await client.open_channel(earner.address, key.secret, Wei(100))
        assert await careful.slot(channel) is None
        await lab.mine(1)
        assert await careful.slot(channel) is None
        assert reports.all == []
        await lab.mine(1)
        seen = await reports.until(lambda s: s.deposit == 100)
        assert seen.block == opened.block
    prepared = await careful.prepare_settlement(earner.address, [voucher(lab.domain, key, earner.address, 60)])
    sending = asyncio.create_task(careful.send_settlement(prepared))
    async with watching(await lab.node(None), earner.address) as now:
        await now.until(lambda s: s.claimed == 60)
    assert await careful.settlement_result(prepared.transaction) is None
    assert not sending.done()
    await lab.mine(2)
    assert (await sending).paid == 60


async def test_an_rpc_that_hangs_is_unavailable_and_what_watches_goes_on_afterwards(lab: ChainLab) -> None:
    user, earner, key = await lab.account(), await lab.account(), session(1)
    client, node = await lab.node(user), await lab.node(earner, timeout_s=0.3)
    async with watching(node, earner.address) as reports:
        await lab.freeze()
        try:
            with pytest.raises(ChainUnavailable):
                await node.head()
        finally:
            await lab.thaw()
        await client.open_channel(earner.address, key.secret, Wei(100))
        await reports.until(lambda s: s.deposit == 100)


async def test_many_transactions_at_once_from_one_wallet_all_count_once(lab: ChainLab) -> None:
    wallet = await lab.account()
    node, targets = await lab.node(wallet), [secret_of(200 + i).address for i in range(8)]
    mined = await asyncio.gather(*(node.transfer(to, Wei(i + 1)) for i, to in enumerate(targets)))
    assert len({m.transaction for m in mined}) == len(targets)
    assert [await node.token_balance(to) for to in targets] == [i + 1 for i in range(len(targets))]
    assert await node.token_balance(wallet.address) == RICH_TALLY - 36


async def test_channels_opened_at_once_do_not_spend_each_other_s_allowance(lab: ChainLab) -> None:
    user, provider = await lab.account(), secret_of(99).address
    node, keys = await lab.node(user), [session(i) for i in range(3)]
    await asyncio.gather(*(node.open_channel(provider, key.secret, Wei(10 * (i + 1))) for i, key in enumerate(keys)))
    slots = [await node.slot(ChannelKey(provider, key.address)) for key in keys]
    assert [slot and slot.deposit for slot in slots] == [10, 20, 30]


async def test_a_node_without_a_wallet_reads_and_refuses_to_write(lab: ChainLab) -> None:
    node = await lab.node(None)
    assert (await node.head()).timestamp > 0
    with pytest.raises(NoWallet):
        await node.transfer(ZERO_ADDRESS, Wei(WEI_PER_TALLY))
    with pytest.raises(NoWallet):
        await node.prepare_settlement(ZERO_ADDRESS, [])
    assert await node.settlement_result(Digest(b"\x01" * 32)) is None
