"""Looks at finished work again: one prefill over prompt and output, and every token judged where it stands.

All that the scheduler does to logits is done to them here, position by position: penalties over what was counted
until there, tokens that may not come before min_tokens, the grammar. Nothing is decoded, so a replay costs what
reading the text costs, and the vocabulary is worked on in blocks of rows.

Contract: the numbers depend on the request and the weights alone, up to the rounding of the kernels at hand. Text that
the model could never have been asked for raises ValueError; text that it would not have written gets large numbers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from node.engine.adjust import adjustment
from node.engine.checks import check_inputs, check_request, check_text
from node.engine.compiled import kernels_for, make_sampler, open_decoder
from node.engine.decoder import Batch, DecoderBase, Forward, Segment
from node.engine.engine import SINGLE_THREAD_PARAMETERS, open_device
from node.engine.generation import EngineError, embedding
from node.engine.grammar import Grammars, Matcher
from node.engine.memory import KV_BUDGET_BYTES, plan_memory
from node.engine.profile import profile_of, resolve_dtype, stored_parameters
from node.engine.sampler import FP16_MAX, Draw, Sampler
from node.engine.scheduler import routing_bytes
from node.engine.spec import load_spec, weight_files
from node.engine.weights import TORCH_DTYPES
from node.ports import EngineRequest, Replay, ReplayRequest, Unreplayable, Urgency
from protocol.errors import LocalProtocolError
from protocol.messages import Profile
from protocol.options import Syntax
from protocol.transcript import LOGPROB_BYTES, PROJECTION_BYTES, PROJECTION_ROWS, ROUTING_BYTES, Row

READ_TOKENS: Final = 128
"""Tokens read by one forward pass. Unit: tokens. Matrix products are at full speed from 48 on; at twice this, what lies
between two layers of a small model no longer fits beside the weights in a core's own cache, and a tenth is lost."""

LOGIT_NUMBERS: Final = 1 << 18
"""Logits that are computed and looked at together. Unit: numbers of four bytes. They stay in a core's cache between the
passes over them; doubling it, where the vocabulary is small, sends them through memory."""

LOGIT_ROWS: Final = 48
"""Least rows of logits computed together, for large vocabularies. Unit: rows. The head is read once for them all; 48
rows of 150,000 numbers take 29 MB."""

GAP_MAX: Final = 32.767
"""Largest gap that is reported. Unit: logits. What a Verdict's 16 bits hold in thousandths; where one token alone was
allowed the gap is without bound."""

TINY: Final = 1e-9
"""Length below which a projected hidden state counts as this long, so that a distance can be relative to it."""

_T = TypeVar("_T")
_Floats = npt.NDArray[np.float64]


class TorchReplayer:
    """Replays under the weights of one model directory. See node.ports.Replayer.

    `dtype`, `threads`, `device`, `compile_option`, `cache_dir`: as of TorchEngine. `max_context`: longest text, tokens;
    None: what the model was made for, or what `kv_budget_bytes` hold. One text is read at a time, in a thread of its
    own; others wait their turn.

    Raises: ModelError from the constructor and `start` for a directory, device or sizes that cannot be used.
    """

    def __init__(
        self,
        model_dir: Path,
        dtype: str = "auto",
        threads: int | None = None,
        device: str = "cpu",
        compile_option: str = "auto",
        cache_dir: Path | None = None,
        max_context: int | None = None,
        kv_budget_bytes: int = KV_BUDGET_BYTES,
    ) -> None:
        self._spec = load_spec(model_dir)
        total = stored_parameters(weight_files(model_dir))
        self._model_dir, self._device = model_dir, open_device(device)
        self._dtype = resolve_dtype(dtype, total, self._device.type)
        self._threads = threads or (1 if total < SINGLE_THREAD_PARAMETERS else torch.get_num_threads())
        self._compile, self._cache_dir = compile_option, cache_dir
        self._context = plan_memory(self._spec, self._dtype, 1, max_context, kv_budget_bytes).context
        self._grammars = Grammars(model_dir / "tokenizer.json", self._spec.vocab, self._spec.eos_ids)
        self._profile: Profile | None = None
        self._decoder: DecoderBase | None = None
        self._sampler: Sampler | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._stopping = threading.Event()
        self._abandoned = threading.Event()  # of the call that the thread is at

    @property
    def profile(self) -> Profile:
        """Raises: LocalProtocolError before `start`, which computes it."""
        if self._profile is None:
            raise LocalProtocolError("the replayer has no profile before it is started")
        return self._profile

    async def start(self) -> None:
        """Load the weights. Raises: ModelError; LocalProtocolError when already started."""
        if self._worker is not None:
            raise LocalProtocolError("the replayer is already started")
        self._stopping.clear()
        self._worker = ThreadPoolExecutor(1, "replay", torch.set_num_threads, (self._threads,))
        try:
            await self._in_thread(self._load)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End the thread after the block it is at; replays under way raise EngineError. Idempotent."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        self._stopping.set()
        await asyncio.to_thread(worker.shutdown, cancel_futures=True)
        self._decoder = self._sampler = None

    async def replay(self, request: ReplayRequest) -> Replay:
        """Raises: ValueError for what could never have been served; Unreplayable for a grammar that does not compile
        here, within limits of time that a faster machine keeps; EngineError when not running or stopped."""
        self._check(request)
        matcher = None
        if request.options.syntax is not Syntax.NONE and request.rows:
            continued = request.prompt[len(request.prompt) - request.options.continued :]
            try:
                matcher = await self._grammars.matcher(request.options, continued)
            except ValueError as exc:
                raise Unreplayable(f"its grammar cannot be followed on this machine: {exc}") from exc
        return await self._in_thread(self._replay, request, matcher)

    async def embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int) -> tuple[bytes, ...]:
        """As Engine.embed. Raises: ValueError; EngineError when not running or stopped, or the text is too long for
        this memory."""
        check_inputs(inputs, dimensions, self._spec, self._spec.max_positions)
        self._check_room(max(map(len, inputs)))
        return await self._in_thread(self._embed, inputs, dimensions)

    async def _in_thread(self, work: Callable[..., _T], *given: object) -> _T:
        """Raises: EngineError when not running or stopped, and what `work` raises."""
        worker, abandoned = self._worker, threading.Event()
        if worker is None:
            raise EngineError("the replayer is not running: start it first")

        def call() -> _T:
            self._abandoned = abandoned
            try:
                with torch.inference_mode():
                    return work(*given)
            except ValueError as exc:  # what no machine serves was looked for before: this one is our own
                raise EngineError(f"the replayer failed at a text it had accepted; nothing was judged: {exc}") from exc

        try:
            return await asyncio.get_running_loop().run_in_executor(worker, call)
        except asyncio.CancelledError:
            abandoned.set()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise EngineError("the replayer was stopped before this text was read") from None

    def _check(self, request: ReplayRequest) -> None:
        """Raises: ValueError; EngineError for what the model could read and this memory cannot hold."""
        prompt, options, spec = request.prompt, request.options, self._spec
        check_text(prompt, spec, spec.max_positions)
        if request.rows:
            most = max(len(request.rows), options.min_tokens - options.continued)
            asked = EngineRequest(prompt, request.seed, most, request.sampling, options)
            check_request(asked, spec, spec.max_positions)
            check_text([row.token_id for row in request.rows], spec, spec.max_positions)
        for row in request.rows:
            lengths = (len(row.logprob), len(row.projection), len(row.routing))
            if lengths[:2] != (LOGPROB_BYTES, PROJECTION_BYTES) or lengths[2] not in (0, ROUTING_BYTES):
                raise ValueError(f"a token's record has fields of {lengths} bytes")
        self._check_room(len(prompt) + len(request.rows))

    def _check_room(self, length: int) -> None:
        """Raises: EngineError."""
        if length > self._context:
            raise EngineError(
                f"a text of {length} tokens, and the KV budget holds {self._context}; nothing was judged: raise it"
            )

    # ------------------------------------------------------------------------------------------- the thread's own

    def _load(self) -> None:
        dtype = TORCH_DTYPES[self._dtype]
        kernels = kernels_for(self._compile, self._spec, dtype, self._device, self._threads, self._cache_dir)
        self._profile = profile_of(self._model_dir, self._dtype, self._device.type)
        place = (self._device, 1, self._context, 0)
        self._decoder = open_decoder(self._model_dir, self._spec, self._dtype, *place, kernels)
        self._sampler = make_sampler(self._spec.vocab, self._spec.hidden, self._device, kernels)

    def _read(self, ids: Sequence[int]) -> Iterator[tuple[int, Forward]]:
        """Forward passes over a text from its start; each with the position of its first row. Raises: EngineError."""
        assert self._decoder is not None
        for start in range(0, len(ids), READ_TOKENS):
            if self._stopping.is_set() or self._abandoned.is_set():
                raise EngineError("the replayer was stopped while it read a text")
            part = Segment(0, start, tuple(ids[start : start + READ_TOKENS]))
            yield start, self._decoder.forward(Batch([], [], [], [part]))

    def _embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int) -> tuple[bytes, ...]:
        vectors = []
        for ids in inputs:
            text = embedding(ids, dimensions, Urgency.STANDARD)
            for _, forward in self._read(ids):
                text.pool(forward.hidden)
            vectors.append(text.vector())
        return tuple(vectors)

    def _replay(self, request: ReplayRequest, matcher: Matcher | None) -> Replay:
        assert self._decoder is not None and self._sampler is not None
        stops = frozenset(request.options.stop_ids) | frozenset(self._spec.eos_ids)
        look = _Look(request, matcher, stops, self._decoder, self._sampler)
        text = (*request.prompt, *(row.token_id for row in request.rows[:-1])) if request.rows else ()
        first, step = len(request.prompt) - 1, max(LOGIT_ROWS, LOGIT_NUMBERS // self._spec.vocab)
        for start, forward in self._read(text):
            end = start + len(forward.hidden)
            for at in range(max(first, start), end, step):
                rows = slice(at - start, min(end, at + step) - start)
                routing = None if forward.routing is None else forward.routing[rows]
                look.at(at - first, forward.hidden[rows], routing)
        ends = tuple(i for i, row in enumerate(request.rows) if row.token_id in stops)
        return Replay(
            tuple(look.margins),
            tuple(look.logprobs),
            tuple(look.projections),
            tuple(look.routing),
            tuple(look.gaps),
            ends,
        )


class _Look:
    """One generation looked at, block by block in order. The lists hold a number per output token looked at so far."""

    def __init__(
        self,
        request: ReplayRequest,
        matcher: Matcher | None,
        stops: frozenset[int],
        decoder: DecoderBase,
        sampler: Sampler,
    ) -> None:
        self._request, self._decoder, self._sampler = request, decoder, sampler
        vocab, device = decoder.spec.vocab, decoder.device
        self._adjustment = adjustment(request.options, request.prompt, stops, matcher, vocab, device)
        words = sampler.projection(request.seed)  # [hidden], a bit for each row of the matrix
        rows = torch.arange(PROJECTION_ROWS, dtype=torch.uint8, device=device)
        signs = 2.0 * (words[:, None] >> rows & 1).float() - 1.0
        self._matrix = signs / len(words) ** 0.5  # [hidden, 8]
        self.margins: list[float] = []
        self.logprobs: list[float] = []
        self.projections: list[float] = []
        self.routing: list[bool] = []
        self.gaps: list[float] = []

    def at(self, index: int, hidden: torch.Tensor, routing: torch.Tensor | None) -> None:
        """The tokens from `index` of the output on, which follow from these rows; see decoder.Forward."""
        request, how = self._request, self._request.sampling
        rows = request.rows[index : index + len(hidden)]
        chosen = torch.tensor([row.token_id for row in rows], device=hidden.device)
        logits = self._decoder.logits(hidden)
        logprobs = self._sampler.logprobs(logits, chosen)
        self.logprobs += _distance(b"".join(row.logprob for row in rows), logprobs.cpu().numpy()).tolist()
        self.projections += _relative(b"".join(row.projection for row in rows), hidden.float() @ self._matrix)
        seen = routing_bytes(routing, len(rows))
        self.routing += [row.routing == experts for row, experts in zip(rows, seen, strict=True)]
        start = len(request.prompt) + index
        draws = [
            Draw.at(request.seed, start + i, how.temperature_micro, how.top_p_micro, how.top_k)
            for i in range(len(rows))
        ]
        logits, allowed = self._adjusted(logits, rows)
        found = self._sampler.look_back(logits, chosen, draws)
        found[allowed:, 0] = torch.inf
        self.margins += found[:, 0].nan_to_num(torch.inf, torch.inf).tolist()
        self.gaps += found[:, 1].nan_to_num(0.0).clamp(0, GAP_MAX).tolist()

    def _adjusted(self, logits: torch.Tensor, rows: Sequence[Row]) -> tuple[torch.Tensor, int]:
        """Logits as the rule reads them, and the index of the first row that no grammar lets be reached."""
        moves = self._adjustment
        if moves is None:
            return logits, len(rows)
        bias = torch.zeros_like(logits)
        for i, row in enumerate(rows):
            moves.fill(bias[i])
            if moves.error:
                return logits + bias, i  # it stays in error, for all later blocks too
            moves.take(row.token_id)
            if moves.idle:
                self._adjustment = None
                break
        return logits + bias, len(rows)


def _distance(claimed: bytes, ours: _Floats) -> _Floats:
    """How far each of our numbers is from those that round to the fp16 numbers claimed; no number is infinitely far."""
    said = np.frombuffer(claimed, ">f2").astype(np.float16)
    with np.errstate(invalid="ignore"):
        rounding = np.spacing(np.abs(said)).astype(np.float64) / 2  # numpy's spacing looks upwards, not outwards
    held = np.clip(ours.astype(np.float64), -FP16_MAX, FP16_MAX)
    away = np.maximum(np.abs(said.astype(np.float64) - held) - rounding, 0)
    return np.where(np.isfinite(said) & np.isfinite(held), away, np.inf)


def _relative(claimed: bytes, ours: torch.Tensor) -> list[float]:
    """Distance of each row claimed from ours, [rows, 8], beyond rounding and as a share of our row's length."""
    numbers = ours.cpu().numpy().astype(np.float64)
    away = _distance(claimed, numbers.reshape(-1)).reshape(numbers.shape)
    relative: list[float] = (np.linalg.norm(away, axis=1) / np.maximum(np.linalg.norm(numbers, axis=1), TINY)).tolist()
    return relative
