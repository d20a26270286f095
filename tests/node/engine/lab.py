"""The scheduler without thread and event loop, one step at a time, and the plain forward that it must agree with."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import torch

from node.engine.compiled import kernels_for, make_decoder, make_sampler
from node.engine.decoder import Batch, Decoder, Forward, Segment
from node.engine.generation import EngineError, Generation
from node.engine.grammar import Matcher
from node.engine.kv import kv_bytes_per_token
from node.engine.prefix_cache import PrefixCache
from node.engine.sampler import Draw, Sampler
from node.engine.scheduler import Scheduler
from node.engine.spec import load_spec
from node.engine.weights import load_weights
from node.ports import EngineRequest, EngineToken, Sampling
from protocol import sampling
from protocol.options import NO_OPTIONS, JobOptions

CPU = torch.device("cpu")
GREEDY = Sampling(0)
WARM = Sampling(900_000, 950_000, 40)
PAYER = hashlib.sha256(b"payer").digest()


def seed(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


def ids(number: int, count: int, vocab: int = 100) -> tuple[int, ...]:
    """`count` tokens that follow from `number`, and never EOS (100)."""
    rng = random.Random(number)
    return tuple(rng.randrange(1, vocab) for _ in range(count))


def computing(
    directory: Path, slots: int, context: int, pool_blocks: int, compile_option: str
) -> tuple[Decoder, Sampler]:
    """Decoder and sampler of a directory in fp32, by torch (off) or by the compiled kernels (on)."""
    spec = load_spec(directory)
    kernels = kernels_for(compile_option, spec, torch.float32, CPU, 1, None)
    with torch.inference_mode():
        weights = load_weights(directory, spec, "fp32", CPU)
        decoder = make_decoder(spec, weights, slots, context, pool_blocks, kernels)
    return decoder, make_sampler(spec.vocab, spec.hidden, CPU, kernels)


class Lab:
    """One scheduler. `tokens`, `vectors`, `errors`: what each stream was given. `read`: tokens computed as prompts.

    `saved_tokens`: host room for displaced streams, tokens. Streams in `slow` are not consumed.
    """

    def __init__(
        self,
        directory: Path,
        slots: int = 2,
        pool_blocks: int = 32,
        saved_tokens: int = 10_000,
        context: int = 512,
        compile_option: str = "off",
    ) -> None:
        torch.set_num_threads(1)
        self.directory, self.compiled = directory, compile_option
        self.spec = load_spec(directory)
        self.decoder, self.sampler = computing(directory, slots, context, pool_blocks, compile_option)
        self._forward = self.decoder.forward
        self.decoder.forward = self._counted  # type: ignore[method-assign]
        self.slots = slots
        self._saved_bytes = saved_tokens * kv_bytes_per_token(self.spec, "fp32")
        self.restart()

    def restart(self) -> None:
        """A scheduler that knows nothing, over the same weights and memory."""
        self.now = 0.0
        self.scheduler = Scheduler(self.decoder, self.sampler, self._saved_bytes, lambda: self.now)
        self.steps = self.read = 0
        self.tokens: dict[Generation, list[EngineToken]] = {}
        self.vectors: dict[Generation, bytes] = {}
        self.errors: dict[Generation, EngineError] = {}
        self.slow: set[Generation] = set()
        self.most_running = 0

    def _counted(self, batch: Batch) -> Forward:
        forward = self._forward(batch)
        self.read += sum(len(part.ids) for part in batch.segments)
        return forward

    @property
    def cache(self) -> PrefixCache:
        return self.scheduler._cache

    def submit(self, request: EngineRequest, matcher: Matcher | None = None) -> Generation:
        stream = Generation(request, self.spec.eos_ids, matcher)
        self.take(stream)
        return stream

    def take(self, stream: Generation) -> None:
        self.tokens[stream] = []
        self.scheduler.submit(stream)

    def step(self) -> list[Generation]:
        """Run a step; who was given something."""
        self.steps += 1
        with torch.inference_mode():
            outcomes = self.scheduler.step()
        self.most_running = max(self.most_running, self.scheduler.active)
        for stream, outcome in outcomes:
            if isinstance(outcome, EngineToken):
                self.tokens[stream].append(outcome)
                if stream not in self.slow:
                    stream.taken = stream.produced
            elif isinstance(outcome, bytes):
                self.vectors[stream] = outcome
            else:
                self.errors[stream] = outcome
        return [stream for stream, _ in outcomes]

    def cancel(self, stream: Generation) -> None:
        with torch.inference_mode():
            self.scheduler.cancel(stream)

    def drain(self, most: int = 5_000) -> None:
        """Step until there is nothing to do."""
        for _ in range(most):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError(f"still at work after {most} steps")

    def text(self, stream: Generation) -> list[int]:
        return [token.token_id for token in self.tokens[stream]]

    def run(self, request: EngineRequest) -> list[int]:
        """One request, to its end."""
        stream = self.submit(request)
        self.drain()
        return self.text(stream)


class Plain:
    """One stream alone: the whole prompt in one forward, then a token at a time, options by the protocol's reference.

    Shares weights and sampling with what it checks, and nothing of the scheduling.
    """

    def __init__(self, directory: Path, compile_option: str = "off", context: int = 512) -> None:
        self.spec = load_spec(directory)
        self._decoder, self._sampler = computing(directory, 1, context, 0, compile_option)

    def generate(self, request: EngineRequest) -> list[int]:
        options, length = request.options, len(request.prompt)
        stops = {*options.stop_ids, *self.spec.eos_ids}
        counts = Counter(request.prompt[length - options.continued :])
        out: list[int] = []
        with torch.inference_mode():
            hidden = self._decoder.forward(Batch([], [], [], [Segment(0, 0, request.prompt)])).hidden[-1:]
            while True:
                logits = self._decoder.logits(hidden)
                early = options.continued + len(out) < options.min_tokens
                token = self._choose(logits, request, length + len(out), counts, stops if early else set())
                out.append(token)
                counts[token] += 1
                if token in stops or len(out) == request.max_tokens:
                    return out
                hidden = self._decoder.forward(Batch([0], [token], [length + len(out) - 1])).hidden

    def _choose(
        self, logits: torch.Tensor, request: EngineRequest, position: int, counts: Counter[int], banned: set[int]
    ) -> int:
        how = request.sampling
        drawn = (how.temperature_micro, how.top_p_micro, how.top_k)
        if request.options == NO_OPTIONS:
            return int(self._sampler.choose(logits, [Draw.at(request.seed, position, *drawn)])[0])
        row = sampling.adjusted(dict(enumerate(logits[0].tolist())), request.options, counts, frozenset(banned))
        return sampling.choose([row[i] for i in range(len(row))], request.seed, position, *drawn)


def ask(
    number: int,
    length: int,
    count: int,
    *,
    salt: bytes = b"",
    how: Sampling = WARM,
    options: JobOptions = NO_OPTIONS,
    **more: object,
) -> EngineRequest:
    """A request that follows from `number`."""
    return EngineRequest(ids(number, length), seed(number), count, how, options, salt=salt, **more)  # type: ignore[arg-type]
