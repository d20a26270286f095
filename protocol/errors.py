"""Errors that say who erred and carry the evidence; only a remote error costs a peer its reputation.

After h11: `LocalProtocolError` means our own code called the machine wrongly, `RemoteProtocolError` means the
peer sent what the protocol forbids. `Refused` is a lawful no, with a code from the table in protocol/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass


class TallyError(Exception):
    """Base of every error of ours. Its text says what happened, what was kept safe, and what to do next."""


class LocalProtocolError(TallyError):
    """We tried to do what the protocol forbids: a bug of ours."""


class RemoteProtocolError(TallyError):
    """The peer did what the protocol forbids. The connection or the job ends; money and receipts are kept."""


@dataclass
class MalformedFrame(RemoteProtocolError):
    """Bytes that are no frame: unknown tag, oversized length, or a body that does not decode."""

    reason: str

    def __str__(self) -> str:
        return f"malformed frame: {self.reason}"


@dataclass
class FrameTooLarge(RemoteProtocolError):
    """A frame's length prefix is above the limit."""

    length: int
    limit: int

    def __str__(self) -> str:
        return f"frame of {self.length} bytes is above the limit of {self.limit}"


@dataclass
class UnexpectedFrame(RemoteProtocolError):
    """A frame that the conversation does not allow in this state."""

    frame: str
    state: str

    def __str__(self) -> str:
        return f"frame {self.frame} is not allowed in state {self.state}"


@dataclass
class BadSignature(RemoteProtocolError):
    """A signature that is malformed, malleable (high s), or of somebody else."""

    document: str
    expected: bytes
    recovered: bytes | None

    def __str__(self) -> str:
        got = "nobody" if self.recovered is None else "0x" + self.recovered.hex()
        return f"{self.document} must be signed by 0x{self.expected.hex()}, but the signature is of {got}"


@dataclass
class FieldOutOfRange(RemoteProtocolError):
    """A field of a signed document does not fit its Solidity type."""

    document: str
    field: str
    value: object

    def __str__(self) -> str:
        return f"{self.document}.{self.field} = {self.value!r} does not fit its type"


@dataclass
class ReceiptMismatch(RemoteProtocolError):
    """A receipt that does not recompute from what was received. Nothing beyond the last good increment is paid."""

    field: str
    claimed: object
    recomputed: object

    def __str__(self) -> str:
        return f"receipt field {self.field} claims {self.claimed!r}, recomputed {self.recomputed!r}"


@dataclass
class Overspend(RemoteProtocolError):
    """A voucher above the confirmed deposit, or a job that would need one."""

    voucher_wei: int
    deposit_wei: int

    def __str__(self) -> str:
        return f"voucher of {self.voucher_wei} wei is above the confirmed deposit of {self.deposit_wei} wei"


@dataclass
class StaleVoucher(RemoteProtocolError):
    """A voucher that does not raise the amount already held, or does not cover what it acknowledges."""

    voucher_wei: int
    needed_wei: int

    def __str__(self) -> str:
        return f"voucher of {self.voucher_wei} wei does not reach the {self.needed_wei} wei it must cover"


@dataclass
class TariffNotInForce(RemoteProtocolError):
    """A tariff used before it starts or after it ends."""

    valid_from: int
    valid_until: int
    now: int

    def __str__(self) -> str:
        return f"tariff is in force from {self.valid_from} until {self.valid_until}, now is {self.now}"


@dataclass
class TierNotOffered(RemoteProtocolError):
    """The tariff has no price for a latency tier: nothing may be sold under it, at any price."""

    tier: str

    def __str__(self) -> str:
        return f"the tariff has no price for the {self.tier} tier; choose another tier or provider"


@dataclass
class Refused(TallyError):
    """A lawful refusal, by us or by the peer: `code` is one of protocol.frames.RefusalCode."""

    code: str
    reason: str

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"
