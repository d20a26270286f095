"""What the chain can refuse, with the evidence; all are ChainError, so callers outside need none of these names."""

from __future__ import annotations

from dataclasses import dataclass, field

from node.ports import ChainError
from protocol.units import WEI_PER_TALLY, Address, Digest


@dataclass
class ContractReverted(ChainError):
    """A contract refused the call. `name`: of its custom error (`Error` for a plain reason). Nothing was changed."""

    action: str
    name: str
    arguments: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        inner = ", ".join(f"{key}={_shown(value)}" for key, value in self.arguments.items())
        return f"{self.action}: the contract refused with {self.name}({inner}); nothing was moved"


@dataclass
class TransactionReplaced(ChainError):
    """Another transaction took this one's nonce: this one can never be mined."""

    transaction: Digest
    nonce: int

    def __str__(self) -> str:
        return (
            f"transaction 0x{self.transaction.hex()} can no longer be mined: another one took nonce {self.nonce}; "
            "vouchers and deposits are untouched, prepare it again"
        )


@dataclass
class OutOfCoin(ChainError):
    """The wallet cannot pay for gas."""

    wallet: Address

    def __str__(self) -> str:
        return f"wallet 0x{self.wallet.hex()} has too little of the chain's coin to pay for gas; nothing was sent"


@dataclass
class NotEnoughTally(ChainError):
    """The wallet holds less TALLY than the action needs. Wei."""

    action: str
    wallet: Address
    has: int
    needs: int

    def __str__(self) -> str:
        return (
            f"{self.action} needs {_tally(self.needs)} TALLY and wallet 0x{self.wallet.hex()} has "
            f"{_tally(self.has)}; nothing was sent"
        )


@dataclass
class NoWallet(ChainError):
    """A transaction was asked of a node that was started without a wallet."""

    action: str

    def __str__(self) -> str:
        return f"{self.action} needs a wallet, and this node was started without one"


@dataclass
class WrongChain(ChainError):
    """The RPC serves another chain than the deployment file describes."""

    expected: int
    found: int
    rpc: str

    def __str__(self) -> str:
        return f"the deployment is on chain {self.expected}, but the RPC at {self.rpc} serves chain {self.found}"


@dataclass
class NoContract(ChainError):
    """There is no code where the deployment file says a contract is."""

    contract: str
    address: Address
    chain_id: int

    def __str__(self) -> str:
        return (
            f"there is no contract {self.contract} at 0x{self.address.hex()} on chain {self.chain_id}: "
            "the deployment file is of another chain, or the chain was started afresh"
        )


def _tally(wei: int) -> str:
    """Exact, without trailing zeros: `1500000000000000000` -> `1.5`."""
    whole, rest = divmod(wei, WEI_PER_TALLY)
    return f"{whole}.{rest:018d}".rstrip("0").rstrip(".")


def _shown(value: object) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)
