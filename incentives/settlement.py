"""When a provider settles: on a schedule, on value, and when a payer asks to leave. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from incentives.channel import Channel
from protocol.units import Wei

MAX_BATCH: Final = 100
"""Vouchers in one settlement. Unit: channels. About 1.1M gas, far below any block limit; beyond it the gas per pair no
longer falls, and a failed transaction costs more."""

LEAVING_MARGIN_S: Final = 600
"""How long before a payer's exit even dust is settled. Unit: s. Enough for a transaction that has to be sent again and
for clocks that differ; before it, a payer who leaves one wei at a time could make us pay gas for each."""


@dataclass(frozen=True, slots=True)
class SettlePolicy:
    """`interval_s`: settle this often when anything is due. `value`: settle at once above this many unclaimed wei.

    `dust`: a channel below this waits (its gas would exceed it), until its payer's exit is near.
    """

    interval_s: int
    value: Wei
    dust: Wei


def due(channels: Iterable[Channel], now_s: int, last_settled_s: int, policy: SettlePolicy) -> list[Channel]:
    """The channels to settle now, most valuable first, at most MAX_BATCH; empty when none is due.

    A channel can be paid no more than its deposit, so only that counts.
    """

    def payable(channel: Channel) -> int:
        return min(channel.vouched, channel.deposit) - channel.claimed

    def last_call(channel: Channel) -> bool:
        return bool(channel.exit_at) and channel.exit_at - now_s < LEAVING_MARGIN_S

    # SPEC 9.2: on a schedule, on value, and at once when a payer requests its exit
    waiting = [channel for channel in channels if payable(channel) > 0]
    waiting = [channel for channel in waiting if payable(channel) >= policy.dust or last_call(channel)]
    leaving = [channel for channel in waiting if channel.exit_at]
    worthy = [channel for channel in waiting if not channel.exit_at]
    on_time = now_s - last_settled_s >= policy.interval_s
    on_value = sum(payable(channel) for channel in worthy) >= policy.value
    chosen = leaving + (worthy if on_time or on_value else [])
    chosen.sort(key=lambda channel: (not channel.exit_at, -payable(channel), channel.key.client, channel.key.provider))
    return chosen[:MAX_BATCH]
