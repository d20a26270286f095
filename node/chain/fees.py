"""What to offer for gas under EIP-1559. All prices in wei of the chain's coin per unit of gas. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.units import BPS

BASE_FEE_ROOM: Final = 2
"""The cap is this many times the current base fee, plus the tip: six full blocks in a row (each raises the base fee
by 1/8) still leave the transaction minable. It is a cap: what is paid is the block's base fee plus the tip."""

BUMP_BPS: Final = 12_500
"""A replacement offers at least x1.25 on both prices. Pools demand x1.10 (Geth, Anvil); below that a replacement
is refused, and doubling it would overpay in a rush."""

GAS_MARGIN_BPS: Final = 12_000
"""The gas limit is x1.2 the estimate: between estimate and block, storage that costs more can appear. Only gas used
is paid."""


@dataclass(frozen=True, slots=True)
class Fees:
    """`cap`: most per gas, base fee included. `tip`: to the block's producer."""

    cap: int
    tip: int

    def at_least(self, other: Fees) -> Fees:
        """The higher of both prices."""
        return Fees(max(self.cap, other.cap), max(self.tip, other.tip))

    def bumped_up(self) -> Fees:
        """The least that replaces a transaction offered at these prices, rounded up."""
        return Fees(-(-self.cap * BUMP_BPS // BPS), -(-self.tip * BUMP_BPS // BPS))


def fees_for(base_fee: int, tip: int) -> Fees:
    """What to offer now. `base_fee`: of the newest block. `tip`: what the node suggests."""
    return Fees(BASE_FEE_ROOM * base_fee + tip, tip)


def gas_limit_up(estimate: int) -> int:
    """Gas limit for an estimate, with the margin, rounded up."""
    return -(-estimate * GAS_MARGIN_BPS // BPS)
