"""The paid-stream conversation as one table: which frame either side may send in which state.

Both roles run the same `Conversation` over what they send and receive; bytes, sockets and money are elsewhere. The
table is the truth: protocol/README.md section 4 is drawn from it and a test compares the two. A frame that crosses
another on the wire (a voucher under way while END comes back) is allowed where it can happen.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from protocol.errors import LocalProtocolError, UnexpectedFrame
from protocol.frames import (
    Abort,
    Accepted,
    Ack,
    Cancel,
    End,
    Frame,
    Ping,
    Pong,
    PromptChunk,
    Quote,
    QuoteAsk,
    Receipt,
    Refuse,
    Request,
    Tokens,
    Vectors,
    VoucherFrame,
)


class Side(StrEnum):
    """Who speaks."""

    CLIENT = "client"
    PROVIDER = "provider"

    @property
    def other(self) -> Side:
        return Side.PROVIDER if self is Side.CLIENT else Side.CLIENT


class State(StrEnum):
    """Where the conversation stands."""

    IDLE = "idle"
    ASKED = "asked"
    QUOTED = "quoted"
    REQUESTED = "requested"
    RUNNING = "running"
    CANCELLING = "cancelling"
    ENDED = "ended"
    CLOSED = "closed"


C, P = Side.CLIENT, Side.PROVIDER

TABLE: Final[dict[State, dict[tuple[Side, type], State]]] = {
    State.IDLE: {(C, QuoteAsk): State.ASKED},
    State.ASKED: {(P, Quote): State.QUOTED, (P, Refuse): State.CLOSED},
    State.QUOTED: {(C, Request): State.REQUESTED},
    State.REQUESTED: {
        (C, PromptChunk): State.REQUESTED,
        (P, Accepted): State.RUNNING,
        (P, Refuse): State.CLOSED,
    },
    State.RUNNING: {
        (P, Tokens): State.RUNNING,
        (P, Vectors): State.RUNNING,
        (P, Receipt): State.RUNNING,
        (C, VoucherFrame): State.RUNNING,
        (C, Cancel): State.CANCELLING,
        (P, End): State.ENDED,
        (P, Abort): State.CLOSED,
    },
    State.CANCELLING: {
        (P, Tokens): State.CANCELLING,
        (P, Vectors): State.CANCELLING,
        (P, Receipt): State.CANCELLING,
        (C, VoucherFrame): State.CANCELLING,
        (P, End): State.ENDED,
        (P, Abort): State.CLOSED,
    },
    State.ENDED: {
        (C, VoucherFrame): State.ENDED,
        (C, Cancel): State.ENDED,
        (C, Ack): State.CLOSED,
    },
    State.CLOSED: {},
}
"""State -> {(side, frame): next state}. Ping and Pong are allowed to both sides in every state but CLOSED."""


class Conversation:
    """One side's view of one job stream. Mutable because it is the single place where the state lives."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.state = State.IDLE

    def sending(self, frame: Frame) -> None:
        """We are about to send `frame`. Raises: LocalProtocolError when the table forbids it."""
        following = self._next(self.side, frame)
        if following is None:
            raise LocalProtocolError(f"{self.side} must not send {type(frame).__name__} in state {self.state}")
        self.state = following

    def received(self, frame: Frame) -> None:
        """The peer sent `frame`. Raises: UnexpectedFrame when the table forbids it."""
        following = self._next(self.side.other, frame)
        if following is None:
            raise UnexpectedFrame(type(frame).__name__, self.state)
        self.state = following

    def _next(self, side: Side, frame: Frame) -> State | None:
        if isinstance(frame, Ping | Pong):
            return None if self.state is State.CLOSED else self.state
        return TABLE[self.state].get((side, type(frame)))
