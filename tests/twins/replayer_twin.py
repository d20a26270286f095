"""The Replayer port without a model: it knows what EngineTwin writes, and measures how far a transcript is from it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from node.ports import Replay, ReplayRequest, Urgency
from protocol.messages import Profile
from protocol.units import BPS
from tests.twins.engine_twin import EOS, EngineTwin

FAR = 5.0
"""Margin of a token that the twin would not have written. Unit: logits."""


class ReplayerTwin:
    """Replays what `engine` would have written; give it an honest one. `replays`: texts looked at."""

    def __init__(self, engine: EngineTwin) -> None:
        self._engine = engine
        self.replays = 0
        self.started = False

    @property
    def profile(self) -> Profile:
        return self._engine.profile

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.started = False

    async def replay(self, request: ReplayRequest) -> Replay:
        assert self.started
        self.replays += 1
        places = range(len(request.prompt), len(request.prompt) + len(request.rows))
        honest = [self._engine.token(request.seed, place) for place in places]
        return Replay(
            margins=tuple(
                0.0 if row.token_id == token else FAR for row, token in zip(request.rows, honest, strict=True)
            ),
            logprobs=tuple(abs(struct.unpack(">e", row.logprob)[0] + 1.5) for row in request.rows),
            projections=(0.0,) * len(request.rows),
            routing=(True,) * len(request.rows),
            gaps=tuple(_gap(request.seed, place) for place in places),
            ends=tuple(i for i, row in enumerate(request.rows) if row.token_id in (EOS, *request.options.stop_ids)),
        )

    async def embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int) -> tuple[bytes, ...]:
        self.replays += 1
        return await self._engine.embed(inputs, dimensions, Urgency.STANDARD)


class RubberStamp(ReplayerTwin):
    """Of a validator that runs nothing: all is well, and the gaps are made up."""

    async def replay(self, request: ReplayRequest) -> Replay:
        zeros, count = (0.0,) * len(request.rows), len(request.rows)
        return Replay(zeros, zeros, zeros, (True,) * count, zeros, ())


class Altering(EngineTwin):
    """An engine that writes another token than its model would, in `share_bps` of all places."""

    share_bps = 2_000

    def token(self, seed: bytes, position: int) -> int:
        honest = super().token(seed, position)
        roll = hashlib.sha256(b"altered" + seed + position.to_bytes(4, "big")).digest()
        altered = int.from_bytes(roll[:4], "big") % BPS < self.share_bps
        return 3 + (honest - 2) % (self.vocab_size - 3) if altered else honest


def _gap(seed: bytes, place: int) -> float:
    word = hashlib.sha256(b"gap" + seed + place.to_bytes(4, "big")).digest()
    return int.from_bytes(word[:2], "big") / 10_000
