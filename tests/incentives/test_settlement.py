"""When to settle: who leaves goes first, dust waits until an exit is near, and the order is nobody's luck."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incentives.channel import Channel
from incentives.ledger import ChannelKey
from incentives.settlement import LEAVING_MARGIN_S, MAX_BATCH, SettlePolicy, due
from protocol.units import Wei
from tests.incentives.samples import address, channel
from tests.protocol.sheets import ON_SLOW_CPU

POLICY = SettlePolicy(interval_s=3_600, value=Wei(1_000), dust=Wei(50))
wei = st.integers(0, 400)


@st.composite
def markets(draw: st.DrawFn, most: int = 30) -> list[Channel]:
    """Channels of one provider: leaving or not, over- and under-vouched, with claims the chain may show."""
    out = []
    for client in range(draw(st.integers(0, most))):
        deposit = draw(wei)
        leaving = draw(st.sampled_from([0, 0, 1, LEAVING_MARGIN_S + 100, 1_800_000_000]))
        claimed = draw(st.integers(0, deposit))
        out.append(channel(client, deposit=deposit, claimed=claimed, vouched=draw(wei), exit_at=leaving))
    return out


policies = st.builds(SettlePolicy, st.integers(0, 100), wei.map(Wei), wei.map(Wei))
times = st.integers(0, 200)


def payable(one: Channel) -> int:
    return min(one.vouched, one.deposit) - one.claimed


def exit_is_near(one: Channel, now_s: int) -> bool:
    return one.exit_at > 0 and one.exit_at < now_s + LEAVING_MARGIN_S


@ON_SLOW_CPU
@given(markets(), times, policies)
def test_who_leaves_is_settled_first_and_always(channels: list[Channel], elapsed: int, policy: SettlePolicy) -> None:
    """Whatever it is worth when the exit is near; before, only dust waits."""
    chosen = due(channels, elapsed, 0, policy)
    least = {one.key: 1 if exit_is_near(one, elapsed) else max(1, policy.dust) for one in channels}
    leaving = {one.key for one in channels if one.exit_at and payable(one) >= least[one.key]}
    assert {one.key for one in chosen[: len(leaving)]} == leaving


@ON_SLOW_CPU
@given(markets(), times, policies)
def test_the_rest_is_settled_on_schedule_or_on_value(
    channels: list[Channel], elapsed: int, policy: SettlePolicy
) -> None:
    chosen = {one.key for one in due(channels, elapsed, 0, policy) if not one.exit_at}
    worthy = [one for one in channels if not one.exit_at and payable(one) >= max(1, policy.dust)]
    now = elapsed >= policy.interval_s or sum(map(payable, worthy)) >= policy.value
    assert chosen == ({one.key for one in worthy} if now else set())


@ON_SLOW_CPU
@given(markets(), times, policies)
def test_only_what_the_deposit_can_pay_is_sent(channels: list[Channel], elapsed: int, policy: SettlePolicy) -> None:
    for one in due(channels, elapsed, 0, policy):
        assert one.claimed < min(one.vouched, one.deposit)
        assert exit_is_near(one, elapsed) or payable(one) >= policy.dust


@ON_SLOW_CPU
@given(markets(), times, policies, st.randoms(use_true_random=False))
def test_the_order_of_the_input_makes_no_difference(
    channels: list[Channel], elapsed: int, policy: SettlePolicy, random: object
) -> None:
    shuffled = list(channels)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    chosen = due(channels, elapsed, 0, policy)
    assert due(shuffled, elapsed, 0, policy) == chosen
    parts = [[one for one in chosen if one.exit_at], [one for one in chosen if not one.exit_at]]
    assert chosen == parts[0] + parts[1]
    for part in parts:
        assert [payable(one) for one in part] == sorted(map(payable, part), reverse=True)


def test_one_session_key_with_two_providers_has_one_order() -> None:
    """The chain's slots are per (provider, client), and so is the order."""
    first = channel(1, deposit=100, vouched=80)
    second = replace(first, key=ChannelKey(address(2), first.key.client))
    assert due([first, second], 4_000, 0, POLICY) == due([second, first], 4_000, 0, POLICY)


def test_a_batch_holds_so_many_and_who_leaves_is_among_them() -> None:
    staying = [channel(client, deposit=10_000, vouched=5_000 + client) for client in range(2 * MAX_BATCH)]
    leaving = [channel(1_000 + client, deposit=1, vouched=1, exit_at=1) for client in range(5)]
    chosen = due(staying + leaving, 0, 0, POLICY)
    assert len(chosen) == MAX_BATCH and chosen[:5] == sorted(leaving, key=lambda one: one.key.client)
    assert chosen[5:] == staying[:MAX_BATCH:-1][: MAX_BATCH - 5]


@pytest.mark.parametrize(
    ("one", "elapsed", "settled"),
    [
        (channel(1, deposit=100, vouched=60), 3_599, False),  # neither time nor value
        (channel(1, deposit=100, vouched=60), 3_600, True),  # on time
        (channel(1, deposit=2_000, vouched=1_000), 0, True),  # on value
        (channel(1, deposit=2_000, vouched=999), 0, False),
        (channel(1, deposit=2_000, vouched=5_000, claimed=1_500), 0, False),  # only 500 are covered
        (channel(1, deposit=100, vouched=49), 9_999, False),  # dust
        (channel(1, deposit=100, vouched=50), 9_999, True),
        (channel(1, deposit=100, vouched=50, exit_at=10**6), 0, True),  # its payer leaves
        (channel(1, deposit=100, vouched=49, exit_at=LEAVING_MARGIN_S), 0, False),  # dust, and there is time
        (channel(1, deposit=100, vouched=1, exit_at=LEAVING_MARGIN_S), 1, True),  # dust, but its payer is almost gone
        (channel(1, deposit=100, vouched=1, exit_at=9), 99, True),  # the payer may go at any moment
        (channel(1, deposit=100, vouched=60, claimed=60, exit_at=9), 9_999, False),  # nothing left to settle
        (channel(1, deposit=60, vouched=90, claimed=60), 9_999, False),  # above the deposit nothing is paid
    ],
)
def test_when_one_channel_is_due(one: Channel, elapsed: int, settled: bool) -> None:
    assert due([one], elapsed, 0, POLICY) == ([one] if settled else [])


def test_everything_at_once() -> None:
    """What a provider asks for when it shuts down: each wei that a voucher and a deposit cover."""
    channels = [channel(client, deposit=100, vouched=client) for client in range(4)]
    assert {one.key for one in due(channels, 0, 0, SettlePolicy(0, Wei(0), Wei(1)))} == {
        one.key for one in channels[1:]
    }
