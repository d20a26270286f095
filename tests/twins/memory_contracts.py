"""What the contracts do, on a plain state: the same errors by name, the same order of checks, the same roundings.

Each function stands for one Solidity function of contracts/src and raises ContractReverted where that one reverts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from incentives.ledger import ChannelKey
from node.chain.errors import ContractReverted
from node.ports import CapacityTerms, ReservationRecord, TariffRecord
from protocol.eip712 import Domain, digest
from protocol.messages import NodeKeyConsent, SessionConsent, Tariff, Voucher
from protocol.signing import recover_digest
from protocol.units import BPS, MAX_AMOUNT, ZERO_ADDRESS, Address, Digest, Wei

FEE_BPS: Final = 1_200


@dataclass(frozen=True, slots=True)
class Channel:
    """One escrow slot and its owner; see IEscrow.Channel."""

    owner: Address = ZERO_ADDRESS
    deposit: int = 0
    claimed: int = 0
    exit_at: int = 0


@dataclass(frozen=True, slots=True)
class SettledEvent:
    """What a batch paid; `claims`: (session key, its new claimed)."""

    paid: int
    fee: int
    claims: tuple[tuple[Address, Wei], ...]


@dataclass
class State:
    """Everything the contracts store after a block. All amounts in wei."""

    timestamp: int
    tally: dict[Address, int] = field(default_factory=dict)
    coin: dict[Address, int] = field(default_factory=dict)
    nonces: dict[Address, int] = field(default_factory=dict)
    channels: dict[ChannelKey, Channel] = field(default_factory=dict)
    earned: dict[Address, int] = field(default_factory=dict)
    fees: int = 0
    escrow: int = 0
    node_keys: dict[Address, Address] = field(default_factory=dict)
    wallets: dict[Address, Address] = field(default_factory=dict)
    stakes: dict[Address, int] = field(default_factory=dict)
    unbonding: dict[Address, tuple[int, int]] = field(default_factory=dict)  # wei, Unix second from which it leaves
    court: dict[Any, Any] = field(default_factory=dict)  # the Court's storage, see memory_court.py
    tariffs: dict[Digest, TariffRecord] = field(default_factory=dict)
    sequences: dict[tuple[Address, Digest], int] = field(default_factory=dict)
    capacities: dict[tuple[Address, Digest], CapacityTerms] = field(default_factory=dict)
    sold: dict[tuple[Address, Digest, int], int] = field(default_factory=dict)
    rights: dict[Digest, ReservationRecord] = field(default_factory=dict)
    purchases: dict[Address, int] = field(default_factory=dict)

    def copy(self, timestamp: int) -> State:
        """An independent state that starts out the same; the values are immutable."""
        out = State(timestamp, fees=self.fees, escrow=self.escrow)
        for name in _TABLES:
            setattr(out, name, dict(getattr(self, name)))
        return out

    def become(self, other: State) -> None:
        """Take over everything of `other`, which must not be used afterwards."""
        for name in ("timestamp", "fees", "escrow", *_TABLES):
            setattr(self, name, getattr(other, name))


_TABLES: Final = tuple(name for name, value in vars(State(0)).items() if isinstance(value, dict))


def open_channel(
    state: State, domain: Domain, sender: Address, signer: Address, amount: int, consent: tuple[SessionConsent, bytes]
) -> None:
    """Escrow.open. `consent`: SessionConsent{sender, provider, deadline} and the session key's signature."""
    document, signature = consent
    key = ChannelKey(document.provider, signer)
    if ZERO_ADDRESS in (key.provider, signer):
        raise ContractReverted("open", "ZeroParty", {"provider": key.provider, "signer": signer})
    if state.timestamp > document.deadline:
        raise ContractReverted("open", "ConsentExpired", {"deadline": document.deadline, "nowSeconds": state.timestamp})
    owner = state.channels.get(key, Channel()).owner
    if owner != ZERO_ADDRESS:
        raise ContractReverted("open", "ChannelTaken", {"provider": key.provider, "signer": signer, "owner": owner})
    recovered = recover_digest(digest(domain, replace(document, owner=sender)), signature)
    if recovered != signer:
        raise ContractReverted("open", "BadConsent", {"signer": signer, "recovered": recovered or ZERO_ADDRESS})
    state.channels[key] = Channel(owner=sender)
    _deposit(state, "open", sender, key, amount)


def top_up(state: State, sender: Address, key: ChannelKey, amount: int) -> None:
    """Escrow.topUp."""
    channel = _owned(state, "topUp", sender, key)
    if channel.exit_at:
        raise ContractReverted("topUp", "ExitPending", {"exitAt": channel.exit_at})
    _deposit(state, "topUp", sender, key, amount)


def settle(state: State, domain: Domain, provider: Address, vouchers: tuple[tuple[Wei, bytes], ...]) -> SettledEvent:
    """Escrow.settle. `vouchers`: (cumulative, signature). Pays min(cumulative, deposit) - claimed, skips the rest."""
    paid, claims = 0, []
    for cumulative, signature in vouchers:
        signer = recover_digest(digest(domain, Voucher(provider, cumulative)), signature)
        if signer is None:
            continue
        key = ChannelKey(provider, signer)
        channel = state.channels.get(key, Channel())
        claimed = min(cumulative, channel.deposit)
        if claimed <= channel.claimed:
            continue
        paid += claimed - channel.claimed
        state.channels[key] = replace(channel, claimed=claimed)
        claims.append((signer, Wei(claimed)))
    fee_down = paid * FEE_BPS // BPS
    state.earned[provider] = state.earned.get(provider, 0) + paid - fee_down
    state.fees += fee_down
    return SettledEvent(paid, fee_down, tuple(claims))


def request_exit(state: State, sender: Address, key: ChannelKey, exit_delay: int) -> None:
    """Escrow.requestExit."""
    channel = _owned(state, "requestExit", sender, key)
    if channel.exit_at:
        raise ContractReverted("requestExit", "ExitPending", {"exitAt": channel.exit_at})
    state.channels[key] = replace(channel, exit_at=state.timestamp + exit_delay)


def exit_channel(state: State, sender: Address, key: ChannelKey) -> None:
    """Escrow.exit."""
    channel = _owned(state, "exit", sender, key)
    if not channel.exit_at:
        raise ContractReverted("exit", "NoExitRequested")
    if state.timestamp < channel.exit_at:
        raise ContractReverted("exit", "ExitTooEarly", {"exitAt": channel.exit_at, "nowSeconds": state.timestamp})
    refund = channel.deposit - channel.claimed
    state.channels[key] = replace(channel, deposit=channel.claimed, exit_at=0)
    state.escrow -= refund
    state.tally[sender] = state.tally.get(sender, 0) + refund


def collect(state: State, provider: Address) -> None:
    """Escrow.collect."""
    amount = state.earned.pop(provider, 0)
    state.escrow -= amount
    state.tally[provider] = state.tally.get(provider, 0) + amount


def transfer(state: State, sender: Address, to: Address, amount: int) -> None:
    """TallyToken.transfer."""
    balance = state.tally.get(sender, 0)
    if balance < amount:
        arguments: dict[str, object] = {"sender": sender, "balance": balance, "needed": amount}
        raise ContractReverted("transfer", "ERC20InsufficientBalance", arguments)
    state.tally[sender] = balance - amount
    state.tally[to] = state.tally.get(to, 0) + amount


def _owned(state: State, action: str, sender: Address, key: ChannelKey) -> Channel:
    channel = state.channels.get(key, Channel())
    if channel.owner != sender:
        raise ContractReverted(action, "NotChannelOwner", {"caller": sender, "owner": channel.owner})
    return channel


def _deposit(state: State, action: str, sender: Address, key: ChannelKey, amount: int) -> None:
    channel = state.channels[key]
    if amount == 0:
        raise ContractReverted(action, "ZeroAmount")
    room = MAX_AMOUNT - channel.deposit
    if amount > room:
        raise ContractReverted(action, "DepositTooLarge", {"deposit": amount, "maximum": room})
    if state.tally.get(sender, 0) < amount:
        raise ContractReverted(action, "TransferFromFailed")
    state.channels[key] = replace(channel, deposit=channel.deposit + amount)
    state.tally[sender] -= amount
    state.escrow += amount


def bind_node_key(
    state: State, domain: Domain, sender: Address, node_key: Address, deadline: int, signature: bytes
) -> None:
    """Registry.register, or rotateNodeKey when the wallet has a key."""
    taken = state.wallets.get(node_key)
    if taken is not None:
        raise ContractReverted("register", "NodeKeyTaken", {"nodeKey": node_key, "wallet": taken})
    if state.timestamp > deadline:
        raise ContractReverted("register", "ConsentExpired", {"deadline": deadline, "nowSeconds": state.timestamp})
    _require_signed("register", digest(domain, NodeKeyConsent(sender, deadline)), node_key, signature)
    state.node_keys[sender] = node_key
    state.wallets[node_key] = sender


def stake(state: State, sender: Address, amount: int, minimum: int) -> None:
    """Registry.stake."""
    active = state.stakes.get(sender, 0) + amount
    if amount == 0:
        raise ContractReverted("stake", "ZeroAmount")
    if active < minimum:
        raise ContractReverted("stake", "StakeBelowMinimum", {"active": active, "minimum": minimum})
    if state.tally.get(sender, 0) < amount:
        raise ContractReverted("stake", "TransferFromFailed")
    state.tally[sender] -= amount
    state.stakes[sender] = active


def request_unbond(state: State, sender: Address, amount: int, minimum: int, delay: int) -> None:
    """Registry.requestUnbond."""
    if amount == 0:
        raise ContractReverted("requestUnbond", "ZeroAmount")
    before = state.stakes.get(sender, 0)
    if amount > before:
        raise ContractReverted("requestUnbond", "InsufficientStake", {"amount": amount, "active": before})
    active = before - amount
    if active and active < minimum:
        raise ContractReverted("requestUnbond", "StakeBelowMinimum", {"active": active, "minimum": minimum})
    state.stakes[sender] = active
    state.unbonding[sender] = (state.unbonding.get(sender, (0, 0))[0] + amount, state.timestamp + delay)


def withdraw(state: State, sender: Address) -> None:
    """Registry.withdraw."""
    amount, release_at = state.unbonding.get(sender, (0, 0))
    if amount == 0:
        raise ContractReverted("withdraw", "NothingUnbonding", {"wallet": sender})
    if state.timestamp < release_at:
        arguments: dict[str, object] = {"releaseAt": release_at, "nowSeconds": state.timestamp}
        raise ContractReverted("withdraw", "StillBonded", arguments)
    del state.unbonding[sender]
    state.tally[sender] = state.tally.get(sender, 0) + amount


def slash(state: State, wallet: Address, amount: int) -> int:
    """Registry.slash without its bounty and burn: what was taken, active stake first."""
    active = min(amount, state.stakes.get(wallet, 0))
    waiting, release_at = state.unbonding.get(wallet, (0, 0))
    unbonding = min(amount - active, waiting)
    state.stakes[wallet] = state.stakes.get(wallet, 0) - active
    if unbonding:
        state.unbonding[wallet] = (waiting - unbonding, release_at)
    return active + unbonding


def log_tariff(state: State, domain: Domain, tariff: Tariff, signature: bytes, epoch_seconds: int) -> None:
    """Registry.logTariff."""
    last = state.sequences.get((tariff.provider, tariff.profile_id), 0)
    if tariff.sequence <= last:
        raise ContractReverted("logTariff", "SequenceNotAbove", {"sequence": tariff.sequence, "last": last})
    earliest = state.timestamp + epoch_seconds
    if tariff.valid_from < earliest:
        arguments: dict[str, object] = {"validFrom": tariff.valid_from, "earliest": earliest}
        raise ContractReverted("logTariff", "TariffTooSoon", arguments)
    if tariff.valid_until <= tariff.valid_from or tariff.valid_until >= 1 << 48:
        window: dict[str, object] = {"validFrom": tariff.valid_from, "validUntil": tariff.valid_until}
        raise ContractReverted("logTariff", "TariffWindow", window)
    node_key = state.node_keys.get(tariff.provider)
    if node_key is None:
        raise ContractReverted("logTariff", "NotRegistered", {"wallet": tariff.provider})
    tariff_hash = digest(domain, tariff)
    _require_signed("logTariff", tariff_hash, node_key, signature)
    state.sequences[tariff.provider, tariff.profile_id] = tariff.sequence
    state.tariffs[tariff_hash] = TariffRecord(tariff.provider, tariff.valid_from, tariff.valid_until)


def _require_signed(action: str, message_digest: Digest, expected: Address, signature: bytes) -> None:
    recovered = recover_digest(message_digest, signature)
    if recovered != expected:
        arguments: dict[str, object] = {"expected": expected, "recovered": recovered or ZERO_ADDRESS}
        raise ContractReverted(action, "BadSignature", arguments)
