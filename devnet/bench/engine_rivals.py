"""Who is measured: our engine as the node runs it, llama.cpp, transformers with continuous batching and without.

Each serves waves: n streams come at once, each with a prompt of its own and exactly as many tokens to write. Rivals
choose greedily, the cheapest way; ours draws by seed at temperature 0.8 and fingerprints every token, as providers do.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import importlib
import itertools
import random
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from devnet.bench.engine_gguf import export_gguf
from node.engine.decoder import Batch
from node.engine.engine import TorchEngine
from node.engine.sampler import Draw
from node.ports import EngineRequest, Sampling

VOCAB_FLOOR: Final = 4
"""Smallest token id of a random prompt: those below are control tokens."""


@dataclass(frozen=True, slots=True)
class Wave:
    """`streams` at once, each reading `prompt` tokens and writing `output`."""

    streams: int
    prompt: int
    output: int

    def prompts(self, vocab: int, number: int) -> list[tuple[int, ...]]:
        """Random, different ones for each number."""
        rng = random.Random(number)
        return [tuple(rng.randrange(VOCAB_FLOOR, vocab) for _ in range(self.prompt)) for _ in range(self.streams)]


@dataclass(frozen=True, slots=True)
class Place:
    """What a rival is given. `largest`: the largest wave that will come; `scratch`: for files of its own."""

    model_dir: Path
    scratch: Path
    threads: int
    device: str
    largest: Wave


class Rival(Protocol):
    """Made for one place; `wave` returns seconds from the first prompt handed over to the last token had."""

    def wave(self, wave: Wave, number: int) -> float: ...


class Tally:
    """TorchEngine: thread, scheduler, event loop, streams."""

    def __init__(self, place: Place) -> None:
        self._loop = asyncio.new_event_loop()
        largest = place.largest
        self._engine = TorchEngine(
            place.model_dir,
            "bf16",
            largest.streams,
            largest.prompt + largest.output,
            threads=place.threads,
            device=place.device,
        )
        self._loop.run_until_complete(self._engine.start())

    def wave(self, wave: Wave, number: int) -> float:
        prompts = wave.prompts(self._engine.vocab_size, number)
        return self._loop.run_until_complete(self._wave(wave, prompts, number))

    async def _wave(self, wave: Wave, prompts: list[tuple[int, ...]], number: int) -> float:
        start = time.perf_counter()
        await asyncio.gather(*(self._stream(prompt, wave.output, number) for prompt in prompts))
        return time.perf_counter() - start

    async def _stream(self, prompt: tuple[int, ...], output: int, number: int, salt: bytes = b"") -> float:
        """Seconds to the first token."""
        seed = hashlib.sha256(repr((number, prompt[:4])).encode()).digest()
        start, first, count = time.perf_counter(), 0.0, 0
        stream = await self._engine.submit(EngineRequest(prompt, seed, output, Sampling(800_000), salt=salt))
        async for _ in stream:
            first = first or time.perf_counter() - start
            count += 1
        assert count == output, f"{count} tokens instead of {output}: the model ended a text"
        return first

    def shared_prompt(self, length: int, number: int) -> tuple[float, float]:
        """Seconds to the first token of a prompt never seen, and of one that shares all but its end with it."""
        rng = random.Random(number)
        prompt = [rng.randrange(VOCAB_FLOOR, self._engine.vocab_size) for _ in range(length + 16)]
        salt = hashlib.sha256(f"salt {number}".encode()).digest()

        async def both() -> tuple[float, float]:
            cold = await self._stream(tuple(prompt), 1, number, salt)
            again = (*prompt[:length], *reversed(prompt[length:]))
            return cold, await self._stream(again, 1, number, salt)

        return self._loop.run_until_complete(both())

    def bandwidth(self, size: int) -> float:
        """Bytes a second at which this device's memory is read: the best of ten sums over `size` bytes."""
        torch = importlib.import_module("torch")
        torch.set_num_threads(self._engine._threads)
        data, best = torch.ones(size // 4, device=self._engine._device), 0.0
        for _ in range(10):
            start = time.perf_counter()
            data.sum().item()
            best = max(best, size / (time.perf_counter() - start))
        return best

    def sampling_share(self, streams: int, length: int, rounds: int) -> float:
        """Seeded sampling and fingerprints, less a plain argmax, as a share of a decoding step; median of rounds."""
        scheduler = self._engine._scheduler
        assert scheduler is not None
        torch, decoder, sampler = importlib.import_module("torch"), scheduler._decoder, scheduler._sampler
        batch = Batch(range(streams), [VOCAB_FLOOR] * streams, [length - 1] * streams)
        seeds = [hashlib.sha256(bytes([i])).digest() for i in range(streams)]
        shares = []
        with torch.inference_mode():
            signs = torch.stack([sampler.projection(seed) for seed in seeds])
            for position in range(rounds):
                marks = [time.perf_counter()]
                hidden = decoder.forward(batch).hidden
                logits = decoder.logits(hidden)
                marks.append(time.perf_counter())
                logits.argmax(-1).tolist()
                marks.append(time.perf_counter())
                chosen = sampler.choose(logits, [Draw.at(seed, position, 800_000, 1_000_000, 0) for seed in seeds])
                sampler.fingerprints(logits, hidden, chosen, signs)
                chosen.tolist()
                marks.append(time.perf_counter())
                body, plain, ours = (b - a for a, b in itertools.pairwise(marks))
                shares.append((ours - plain) / (body + plain))
        return statistics.median(shares)


class LlamaCpp:
    """llama-cpp-python's low-level batches: one context per number of streams, a KV cache for each stream, flash
    attention; measured to be its fastest settings."""

    def __init__(self, place: Place) -> None:
        self._api = api = importlib.import_module("llama_cpp")
        self._silent = api.llama_log_callback(lambda *_: None)
        api.llama_log_set(self._silent, None)
        path = export_gguf(place.model_dir, place.scratch / f"rival-{place.threads}.gguf")
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._threads, self._contexts = place.threads, dict[Wave, Any]()
        self._sampler = api.llama_sampler_init_greedy()

    def _context(self, wave: Wave) -> Any:
        if wave not in self._contexts:
            given = self._api.llama_context_default_params()
            given.n_ctx = wave.streams * (wave.prompt + wave.output)
            given.n_batch = max(512, wave.streams * wave.prompt)
            given.n_seq_max = wave.streams
            given.n_threads = given.n_threads_batch = self._threads
            given.kv_unified, given.flash_attn_type, given.no_perf = False, 1, True
            self._contexts[wave] = self._api.llama_init_from_model(self._model, given)
        return self._contexts[wave]

    def wave(self, wave: Wave, number: int) -> float:
        api, context = self._api, self._context(wave)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        batch = api.llama_batch_init(wave.streams * wave.prompt, 0, 1)
        prompts = wave.prompts(self._vocab, number)
        start = time.perf_counter()
        rows = [(token, at, s) for s, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        last = {(s + 1) * wave.prompt - 1 for s in range(wave.streams)}
        tokens = self._decode(context, batch, rows, last)
        for at in range(wave.prompt, wave.prompt + wave.output - 1):
            rows = [(token, at, s) for s, token in enumerate(tokens)]
            tokens = self._decode(context, batch, rows, set(range(wave.streams)))
        seconds = time.perf_counter() - start
        api.llama_batch_free(batch)
        return seconds

    def _decode(self, context: Any, batch: Any, rows: list[tuple[int, int, int]], wanted: set[int]) -> list[int]:
        """Feed (token, position, stream) rows; the next token after each wanted one."""
        batch.n_tokens = len(rows)
        for i, (token, position, stream) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = stream, i in wanted
        if self._api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        return [self._api.llama_sampler_sample(self._sampler, context, ctypes.c_int32(i)) for i in sorted(wanted)]


class Transformers:
    """AutoModelForCausalLM in bf16; `continuous` picks generate_batch, else generate over a static batch."""

    continuous = False

    def __init__(self, place: Place) -> None:
        self._torch, self._api = importlib.import_module("torch"), importlib.import_module("transformers")
        self._api.logging.set_verbosity_error()
        self._api.logging.disable_progress_bar()
        self._torch.set_num_threads(place.threads)
        self._model = self._api.AutoModelForCausalLM.from_pretrained(
            place.model_dir, dtype=self._torch.bfloat16, attn_implementation="sdpa"
        )
        self._model.eval().to(place.device)
        self._device, self._largest = place.device, place.largest

    def _config(self, output: int) -> Any:
        eos = -1 if self.continuous else None
        return self._api.GenerationConfig(
            max_new_tokens=output, do_sample=False, eos_token_id=eos, pad_token_id=0, use_cache=True
        )

    def wave(self, wave: Wave, number: int) -> float:
        ids = self._torch.tensor(wave.prompts(self._model.config.vocab_size, number), device=self._device)
        start = time.perf_counter()
        with self._torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), generation_config=self._config(wave.output)
            )
        out.tolist()
        seconds = time.perf_counter() - start
        assert out.shape[1] == wave.prompt + wave.output
        return seconds


class TransformersContinuous(Transformers):
    """Its own scheduler, kept between waves, with a cache for the largest one and no more: left alone it takes nine
    tenths of the memory."""

    continuous = True
    page = 32

    def wave(self, wave: Wave, number: int) -> float:
        largest = self._largest
        pages = 2 + largest.streams * (2 + (largest.prompt + largest.output) // self.page)
        settings = self._api.ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=pages,
            max_batch_tokens=max(512, largest.streams * largest.prompt),
            max_requests_per_batch=largest.streams,
            allow_block_sharing=False,
        )
        prompts = [list(prompt) for prompt in wave.prompts(self._model.config.vocab_size, number)]
        start = time.perf_counter()
        out = self._model.generate_batch(
            prompts,
            generation_config=self._config(wave.output),
            continuous_batching_config=settings,
            persistent_manager=True,
            warmup=False,
        )
        seconds = time.perf_counter() - start
        counts = [len(result.generated_tokens) for result in out.values()]
        assert counts == [wave.output] * wave.streams, f"it wrote {counts} tokens"
        return seconds


RIVALS: Final[dict[str, type[Any]]] = {
    "tally": Tally,
    "llama.cpp": LlamaCpp,
    "continuous": TransformersContinuous,
    "generate": Transformers,
}
"""Name -> maker."""


def make(name: str, place: Place) -> Rival:
    """Raises: ImportError where its packages are missing, and whatever it says when it cannot serve the model."""
    if place.device == "cpu":
        with suppress(RuntimeError):  # set once a process; a second call is refused and changes nothing
            importlib.import_module("torch").set_num_interop_threads(1)
    made: Rival = RIVALS[name](place)
    return made
