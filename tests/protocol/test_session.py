"""The conversation table: both sides agree on it, nothing outside it passes, and the written spec draws it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import protocol
from protocol.errors import LocalProtocolError, UnexpectedFrame
from protocol.frames import Accepted, Cancel, JobFrame, PromptChunk
from protocol.session import TABLE, Conversation, Side, State

KINDS = list(get_args(JobFrame))
SPEC = Path(protocol.__file__).with_name("README.md")


def blank(kind: Any) -> object:
    """A frame of that kind; its content does not matter to the table."""
    return kind(*(None for _ in kind.__struct_fields__))


@given(st.sampled_from(list(State)), st.sampled_from(KINDS), st.sampled_from(list(Side)))
def test_table_is_the_only_law(state: State, kind: type, side: Side) -> None:
    ours, theirs = Conversation(side), Conversation(side.other)
    ours.state = theirs.state = state
    following = TABLE[state].get((side, kind))
    keeps_alive = kind.__name__ in ("Ping", "Pong") and state is not State.CLOSED
    if following is None and not keeps_alive:
        with pytest.raises(LocalProtocolError):
            ours.sending(blank(kind))  # type: ignore[arg-type]
        with pytest.raises(UnexpectedFrame):
            theirs.received(blank(kind))  # type: ignore[arg-type]
        assert ours.state is theirs.state is state
    else:
        ours.sending(blank(kind))  # type: ignore[arg-type]
        theirs.received(blank(kind))  # type: ignore[arg-type]
        assert ours.state is theirs.state is (following or state)


class Wire(RuleBasedStateMachine):
    """Two sides over a lossless, delaying wire: lawful senders never make the other side refuse a frame.

    A provider accepts only once it has read the whole prompt, so ACCEPTED never crosses a prompt chunk. What reaches
    a side that is through is not read any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sides = {side: Conversation(side) for side in Side}
        self.under_way: dict[Side, list[object]] = {side: [] for side in Side}

    @rule(side=st.sampled_from(list(Side)), data=st.data())
    def send(self, side: Side, data: st.DataObject) -> None:
        conversation = self.sides[side]
        reading = any(type(frame) is PromptChunk for frame in self.under_way[side.other])
        accepted = any(type(frame) is Accepted for frame in self.under_way[side.other])
        never = {Accepted} if reading else {PromptChunk} if accepted else set()
        lawful = [kind for who, kind in TABLE[conversation.state] if who is side and kind not in never]
        if not lawful:
            return
        frame = blank(data.draw(st.sampled_from(lawful)))
        conversation.sending(frame)  # type: ignore[arg-type]
        self.under_way[side].append(frame)

    @rule(side=st.sampled_from(list(Side)))
    def deliver(self, side: Side) -> None:
        if not self.under_way[side]:
            return
        frame, reader = self.under_way[side].pop(0), self.sides[side.other]
        if reader.state is not State.CLOSED:
            reader.received(frame)  # type: ignore[arg-type]

    @invariant()
    def known_state(self) -> None:
        assert all(conversation.state in TABLE for conversation in self.sides.values())


TestWire = Wire.TestCase


def test_cancel_crosses_end() -> None:
    """The client cancels while END is on its way: neither side may refuse the other."""
    client = Conversation(Side.CLIENT)
    client.state = State.RUNNING
    client.sending(Cancel())
    assert client.state is State.CANCELLING
    provider = Conversation(Side.PROVIDER)
    provider.state = State.ENDED
    provider.received(Cancel())
    assert provider.state is State.ENDED


def test_spec_draws_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (client|provider) \| `(\w+)` \| `(\w+)` \|$", SPEC.read_text(), re.MULTILINE)
    written = {(State(a), Side(b), c, State(d)) for a, b, c, d in rows}
    table = {(state, side, kind.__name__, to) for state, row in TABLE.items() for (side, kind), to in row.items()}
    assert written == table
