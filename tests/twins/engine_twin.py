"""An engine without a model: each token is a hash of seed and position, so it is seed-locked like the real one.

What a second provider continues with the parent's seed is what the first would have written, which is all that the
rest of the node relies on. `pace` is awaited before each token, for tests that need to stop the world at one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable

from node.ports import EngineFull, EngineRequest, EngineStats, EngineToken
from protocol.card import special_policy_hash
from protocol.messages import Profile
from protocol.units import ZERO_DIGEST, FinishReason

EOS = 2


def profile(name: bytes = b"twin") -> Profile:
    """A small, valid profile of a model without special tokens that stops at EOS; `name` makes it another one."""
    return Profile(
        weights_root=hashlib.sha256(name).digest(),
        tokenizer_hash=hashlib.sha256(b"{}").digest(),
        chat_template_hash=hashlib.sha256(b"").digest(),
        special_policy_hash=special_policy_hash({}, (EOS,)),
        dtype_hash=ZERO_DIGEST,
        kv_dtype_hash=ZERO_DIGEST,
        engine_hash=ZERO_DIGEST,
        sampler_hash=ZERO_DIGEST,
        margin_milli=100,
        flag_ppm=1000,
        active_parameters=1_000_000,
        total_parameters=1_000_000,
        body_parameters=900_000,
        head_parameters=100_000,
        layers=2,
        heads=4,
        head_dim=16,
        window=0,
    )


class EngineTwin:
    """Implements the Engine port. `eos_every` 0: never stops before max_tokens. `lie`: token index to falsify."""

    def __init__(self, slots: int = 16, eos_every: int = 0, vocab_size: int = 4096) -> None:
        self.profile = profile()
        self.max_context = 4096
        self.vocab_size = vocab_size
        self.slots = slots
        self.eos_every = eos_every
        self.pace: Callable[[int], Awaitable[None]] | None = None
        self.lie: int | None = None
        self.active = 0
        self.emitted = 0

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(self.slots, self.active, 0, 0, self.emitted)

    def submit(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        if self.active >= self.slots:
            raise EngineFull(f"all {self.slots} slots are taken")
        if len(request.prompt) + request.max_tokens > self.max_context:
            raise ValueError("too long")
        return self._generate(request)

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        self.active += 1
        try:
            for index in range(request.max_tokens):
                if self.pace is not None:
                    await self.pace(index)
                position = len(request.prompt) + index
                token = self.token(request.seed, position)
                if index == self.lie:
                    token = (token + 1) % self.vocab_size
                stop = token == EOS or token in request.stop_ids
                finish = FinishReason.STOP if stop else FinishReason.OPEN
                if not stop and index + 1 == request.max_tokens:
                    finish = FinishReason.LENGTH
                self.emitted += 1
                yield EngineToken(token, struct.pack(">e", -1.5), bytes(16), finish)
                if finish is not FinishReason.OPEN:
                    return
        finally:
            self.active -= 1

    def token(self, seed: bytes, position: int) -> int:
        """The token that this seed puts at an absolute position."""
        word = int.from_bytes(hashlib.sha256(seed + position.to_bytes(4, "big")).digest()[:4], "big")
        if self.eos_every and word % self.eos_every == 0:
            return EOS
        return 3 + word % (self.vocab_size - 3)
