"""An engine without a model: each token is a hash of seed and position, so it is seed-locked like the real one.

What a second provider continues with the parent's seed is what the first would have written, which is all that the
rest of the node relies on. `pace` is awaited before each token, for tests that need to stop the world at one.
Stops, min_tokens, alternatives and prefix cache work; penalties and grammars, which need logits, change nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from node.ports import EngineFull, EngineRequest, EngineStats, EngineToken, Urgency
from protocol.cache import BLOCK_TOKENS, block_heads, hit_limit
from protocol.card import special_policy_hash
from protocol.messages import Profile
from protocol.options import Syntax
from protocol.transcript import routing_fingerprint
from protocol.units import ZERO_DIGEST, Digest, FinishReason, Verifiability

EOS = 2
HIDDEN = 16


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
        logprob_micro=10000,
        projection_micro=20000,
        flag_ppm=1000,
        active_parameters=1_000_000,
        total_parameters=1_000_000,
        body_parameters=900_000,
        head_parameters=100_000,
        layers=2,
        heads=4,
        head_dim=16,
        window=0,
        moe_layers=0,
        experts=0,
        experts_chosen=0,
        reasoning_start=0,
        reasoning_end=0,
    )


class EngineTwin:
    """Implements the Engine port. `eos_every` 0: never stops before max_tokens. `lie`: token index to falsify.

    `keeps`: whether prompts stay in the prefix cache. `wait`: what wait_ms answers.
    """

    def __init__(self, slots: int = 16, eos_every: int = 0, vocab_size: int = 4096) -> None:
        self.profile = profile()
        self.max_context = 4096
        self.vocab_size = vocab_size
        self.hidden_size = HIDDEN
        self.verifiability = Verifiability.REPLAY
        self.slots = slots
        self.eos_every = eos_every
        self.pace: Callable[[int], Awaitable[None]] | None = None
        self.lie: int | None = None
        self.keeps = True
        self.wait = 0
        self.active = 0
        self.emitted = 0
        self.read = 0
        self.hit = 0
        self._held: set[Digest] = set()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats(self.slots, self.active, 0, 0, self.emitted, self.read, self.hit)

    def wait_ms(self, urgency: Urgency, prompt_tokens: int) -> int:
        return self.wait

    async def submit(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        self._admit(len(request.prompt) + request.max_tokens)
        if request.options.syntax is Syntax.JSON_SCHEMA:
            json.loads(request.options.grammar)  # a JSONDecodeError is a ValueError
        return self._generate(request)

    async def embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int, urgency: Urgency) -> tuple[bytes, ...]:
        if not 0 <= dimensions <= HIDDEN:
            raise ValueError(f"dimensions {dimensions} is not in 0..{HIDDEN}")
        self._admit(max(map(len, inputs)))
        self.read += sum(map(len, inputs))
        return tuple(self.vector(ids, dimensions or HIDDEN) for ids in inputs)

    def _admit(self, length: int) -> None:
        if self.active >= self.slots:
            raise EngineFull(f"all {self.slots} slots are taken")
        if length > self.max_context:
            raise ValueError("too long")

    async def _generate(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        self.active += 1
        try:
            cached, kept = self._look_up(request)
            for index in range(request.max_tokens):
                if self.pace is not None:
                    await self.pace(index)
                token = self._next(request, index)
                stop = token == EOS or token in request.options.stop_ids
                finish = FinishReason.STOP if stop else FinishReason.OPEN
                if not stop and index + 1 == request.max_tokens:
                    finish = FinishReason.LENGTH
                self.emitted += 1
                yield EngineToken(
                    token,
                    struct.pack(">e", -1.5),
                    bytes(16),
                    finish,
                    cached,
                    kept,
                    routing_fingerprint([token % 4]) if self.profile.moe_layers else b"",
                    tuple((token + i, struct.pack(">e", -1.5 - i)) for i in range(request.options.alternatives)),
                )
                if finish is not FinishReason.OPEN:
                    return
        finally:
            self.active -= 1

    def _look_up(self, request: EngineRequest) -> tuple[int, bool]:
        """(tokens of the prompt that are a hit, whether it is all held now)."""
        self.read += len(request.prompt)
        if not request.salt:
            return 0, False
        heads = block_heads(request.salt, request.prompt)
        blocks = next((k for k in range(len(heads) - 1, 0, -1) if heads[k] in self._held), 0)
        cached = min(blocks * BLOCK_TOKENS, hit_limit(len(request.prompt)))
        self.hit += cached
        if self.keeps:
            self._held.update(heads[1:])
        return cached, len(heads) > 1 and heads[-1] in self._held

    def _next(self, request: EngineRequest, index: int) -> int:
        options = request.options
        token = self.token(request.seed, len(request.prompt) + index)
        if options.continued + index < options.min_tokens:
            while token == EOS or token in options.stop_ids:
                token = (token + 1) % self.vocab_size
        return (token + 1) % self.vocab_size if index == self.lie else token

    def token(self, seed: bytes, position: int) -> int:
        """The token that this seed puts at an absolute position."""
        word = int.from_bytes(hashlib.sha256(seed + position.to_bytes(4, "big")).digest()[:4], "big")
        if self.eos_every and word % self.eos_every == 0:
            return EOS
        return 3 + word % (self.vocab_size - 3)

    def vector(self, token_ids: Sequence[int], size: int = HIDDEN) -> bytes:
        """The unit vector of a text: `size` fp32, little-endian."""
        raw = hashlib.sha256(struct.pack(f">{len(token_ids)}I", *token_ids)).digest()[:size]
        norm = math.sqrt(sum((byte + 1) ** 2 for byte in raw))
        return struct.pack(f"<{size}f", *((byte + 1) / norm for byte in raw))
