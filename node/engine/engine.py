"""The engine port over the torch decoder: a thread that steps the scheduler, and streams that asyncio consumes.

Contract: every submitted stream ends exactly once: with a token that has a finish reason, with EngineError, or by its
consumer's aclose. Tokens of one step reach the event loop in one call. A stream that is not consumed pauses after
RUN_AHEAD tokens and holds its slot; nothing is ever dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import torch

from node.engine.decoder import Decoder
from node.engine.kv import kv_bytes_per_token
from node.engine.profile import profile_of, resolve_dtype, stored_parameters
from node.engine.sampler import Sampler
from node.engine.scheduler import RESUME_AT, Generation, Scheduler
from node.engine.spec import ModelError, ModelSpec, load_spec, weight_files
from node.engine.weights import load_weights
from node.ports import EngineFull, EngineRequest, EngineStats, EngineToken
from protocol.errors import FieldOutOfRange, LocalProtocolError, TallyError
from protocol.messages import Profile
from protocol.sampling import check_sampling
from protocol.units import FinishReason

KV_BUDGET_BYTES: Final = 2 << 30
"""Default memory for keys and values of all slots. Unit: bytes. The context is cut to what fits; doubling it doubles
the context or slots a large model can be given, and the memory taken when all are full."""

SINGLE_THREAD_PARAMETERS: Final = 200_000_000
"""Below this size one CPU thread computes unless told otherwise. Unit: parameters. Kernels of small models take
microseconds, less than threads need to meet; beside other work, two threads were measured a hundred times slower."""

MIN_CONTEXT: Final = 256
"""Shortest context worth serving when the budget decides. Unit: tokens."""

_log = logging.getLogger(__name__)


class EngineError(TallyError):
    """The engine stopped or failed while a stream was open. What was received stays valid; the rest will not come."""


def context_that_fits(spec: ModelSpec, dtype: str, slots: int, max_context: int | None, kv_budget_bytes: int) -> int:
    """Longest prompt plus output, in tokens, that the model was made for and the KV budget holds in every slot.

    Raises: ModelError when what was asked for does not fit; says the numbers.
    """
    if max_context is not None and not 0 < max_context <= spec.max_positions:
        raise ModelError(f"max_context {max_context} is not in 1..{spec.max_positions}, what the model was made for")
    wanted = max_context or spec.max_positions
    per_token = slots * kv_bytes_per_token(spec, dtype)
    fits = kv_budget_bytes // per_token
    needed = wanted if max_context is not None else min(wanted, MIN_CONTEXT)
    if fits < needed:
        raise ModelError(
            f"{slots} slots of {needed} tokens need {needed * per_token} bytes of KV memory, "
            f"the budget is {kv_budget_bytes}: lower slots or max_context, or raise kv_budget_bytes"
        )
    return min(wanted, fits)


class TokenStream(AsyncIterator[EngineToken]):
    """One generation as its consumer sees it. Use with contextlib.aclosing, or read it to the end."""

    def __init__(self, engine: TorchEngine, stream: Generation) -> None:
        self._engine, self._stream = engine, stream
        self._ready: deque[EngineToken] = deque()
        self._arrived = asyncio.Event()
        self._freed = asyncio.Event()
        self._error: EngineError | None = None
        self._closed = False

    async def __anext__(self) -> EngineToken:
        """Raises: EngineError when the engine fails or stops; StopAsyncIteration after the last token."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._closed or self._freed.is_set():
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        token = self._ready.popleft()
        stream = self._stream
        stream.taken += 1
        if stream.paused and stream.produced - stream.taken <= RESUME_AT:
            self._engine._wake()
        return token

    async def aclose(self) -> None:
        """End the generation; when this returns, its slot or queue place is free. Idempotent."""
        if not self._closed:
            self._closed = True
            self._ready.clear()
            self._arrived.set()
            if not self._freed.is_set():
                self._engine._cancel(self._stream)
        await self._freed.wait()

    def __del__(self) -> None:
        if not self._closed and not self._freed.is_set():
            self._engine._cancel(self._stream)  # dropped without aclose: the slot must not stay taken

    def _put(self, token: EngineToken) -> None:
        if not self._closed:
            self._ready.append(token)
        if token.finish is not FinishReason.OPEN:
            self._freed.set()
        self._arrived.set()

    def _end(self, error: EngineError | None) -> None:
        self._error = error
        self._freed.set()
        self._arrived.set()


class TorchEngine:
    """Serves one model directory. See node.ports.Engine.

    `dtype`: auto, bf16 or fp32 (auto: fp32 on a CPU up to AUTO_FP32_PARAMETERS, else bf16). `max_context` None: what
    the model was made for, or what the KV budget holds. `threads` None: 1 below SINGLE_THREAD_PARAMETERS, else all
    cores. `max_queue`: streams that may wait for a slot. `device`: a torch device.

    Raises: ModelError from the constructor for a directory or sizes that cannot be served.
    """

    def __init__(
        self,
        model_dir: Path,
        dtype: str = "auto",
        slots: int = 16,
        max_context: int | None = None,
        kv_budget_bytes: int = KV_BUDGET_BYTES,
        threads: int | None = None,
        max_queue: int = 64,
        device: str = "cpu",
    ) -> None:
        if slots < 1 or max_queue < 0:
            raise ModelError(f"slots must be at least 1 and max_queue at least 0, got {slots} and {max_queue}")
        self._spec = load_spec(model_dir)
        total = stored_parameters(weight_files(model_dir))
        self._model_dir, self._device = model_dir, torch.device(device)
        self._dtype = resolve_dtype(dtype, total, self._device.type)
        self._slots, self._max_queue = slots, max_queue
        self._context = context_that_fits(self._spec, self._dtype, slots, max_context, kv_budget_bytes)
        self._threads = threads or (1 if total < SINGLE_THREAD_PARAMETERS else torch.get_num_threads())
        self._profile: Profile | None = None
        self._decoder: Decoder | None = None
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wakeup = threading.Condition()  # guards the two below
        self._inbox: list[tuple[bool, Generation]] = []  # (submitted, else cancelled)
        self._stopping = False
        self._streams: dict[Generation, weakref.ref[TokenStream]] = {}  # open ones; used on the event loop only

    # ---------------------------------------------------------------------------------------------- asyncio side

    @property
    def profile(self) -> Profile:
        """Known once started."""
        if self._profile is None:
            raise LocalProtocolError("the engine is not started: its profile is not known yet")
        return self._profile

    @property
    def max_context(self) -> int:
        return self._context

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab

    async def start(self) -> None:
        """Hash and load the model, start the thread. Raises: ModelError; LocalProtocolError when already started."""
        if self._thread is not None:
            raise LocalProtocolError("the engine is already started")
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        scheduler = await asyncio.to_thread(self._load)
        self._scheduler = scheduler
        self._thread = threading.Thread(target=self._run, args=(scheduler,), name="engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its current step; open streams raise EngineError. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        await asyncio.to_thread(thread.join)
        self._end_all(EngineError("the engine was stopped while the stream was open"))
        with self._wakeup:
            self._inbox.clear()  # a later start must not hear of streams that ended here
        self._scheduler = self._decoder = None

    def submit(self, request: EngineRequest) -> TokenStream:
        """Raises: EngineFull; ValueError; EngineError when the engine is not running."""
        if self._thread is None or self._stopping:
            raise EngineError("the engine is not running: start it first, or see its log for why it stopped")
        self._check(request)
        if len(self._streams) >= self._slots + self._max_queue:
            raise EngineFull(f"all {self._slots} slots and {self._max_queue} queue places are taken: try again later")
        stream = Generation(request, self._spec.eos_ids)
        consumer = TokenStream(self, stream)
        self._streams[stream] = weakref.ref(consumer)
        self._tell(True, stream)
        return consumer

    def stats(self) -> EngineStats:
        scheduler, decoder = self._scheduler, self._decoder
        return EngineStats(
            slots=self._slots,
            active=scheduler.active if scheduler else 0,
            queued=sum(stream.waiting for stream in self._streams),
            kv_bytes=decoder.kv.bytes if decoder else 0,
            tokens_total=scheduler.tokens_total if scheduler else 0,
        )

    def _check(self, request: EngineRequest) -> None:
        """Raises: ValueError saying what does not fit."""
        if not request.prompt:
            raise ValueError("the prompt is empty: at least one token is needed")
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens is {request.max_tokens}, at least 1 is needed")
        length = len(request.prompt) + request.max_tokens
        if length > self._context:
            raise ValueError(
                f"prompt of {len(request.prompt)} tokens plus max_tokens {request.max_tokens} is {length}, "
                f"the context holds {self._context}"
            )
        low, high = min(request.prompt), max(request.prompt)
        if low < 0 or high >= self._spec.vocab:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {self._spec.vocab}")
        if len(request.seed) != 32 or len(request.salt) != 32:
            raise ValueError(f"seed and salt must be 32 bytes, got {len(request.seed)} and {len(request.salt)}")
        try:
            check_sampling(request.sampling.temperature_micro, request.sampling.top_p_micro, request.sampling.top_k)
        except FieldOutOfRange as exc:
            raise ValueError(str(exc)) from exc

    def _deliver(self, tokens: list[tuple[Generation, EngineToken]], freed: list[Generation]) -> None:
        """On the event loop: hand out one step's tokens and confirm cancellations."""
        for stream, token in tokens:
            reference = self._streams.get(stream)
            if reference is not None and token.finish is not FinishReason.OPEN:
                del self._streams[stream]
            consumer = reference() if reference is not None else None
            if consumer is not None:
                consumer._put(token)
        for stream in freed:
            reference = self._streams.pop(stream, None)
            consumer = reference() if reference is not None else None
            if consumer is not None:
                consumer._end(None)

    def _end_all(self, error: EngineError) -> None:
        """On the event loop: nothing more will come for anybody."""
        streams, self._streams = self._streams, {}
        for reference in streams.values():
            consumer = reference()
            if consumer is not None:
                consumer._end(error)

    # -------------------------------------------------------------------------------------------- from any thread

    def _tell(self, submitted: bool, stream: Generation) -> None:
        with self._wakeup:
            self._inbox.append((submitted, stream))
            self._wakeup.notify()

    def _cancel(self, stream: Generation) -> None:
        self._tell(False, stream)

    def _wake(self) -> None:
        with self._wakeup:
            self._wakeup.notify()

    # ------------------------------------------------------------------------------------------- the engine's thread

    def _load(self) -> Scheduler:
        self._profile = profile_of(self._model_dir, self._dtype, self._device.type)
        with torch.inference_mode():
            weights = load_weights(self._model_dir, self._spec, self._dtype, self._device)
            self._decoder = Decoder(self._spec, weights, self._slots, self._context)
            return Scheduler(self._decoder, Sampler(self._spec.vocab, self._spec.hidden, self._device))

    def _run(self, scheduler: Scheduler) -> None:
        torch.set_num_threads(self._threads)  # of this thread, and of any that first uses torch later
        try:
            with torch.inference_mode():
                while self._turn(scheduler):
                    pass
        except Exception as exc:  # noqa: BLE001 - a fault of torch or of memory must reach every stream
            _log.exception("the engine failed; all open streams end with an error")
            self._stopping = True
            self._post(self._end_all, EngineError(f"the engine failed: {exc!r}"))

    def _turn(self, scheduler: Scheduler) -> bool:
        """Wait for work, apply what was asked, run one step. False when it is time to end."""
        with self._wakeup:
            while not (self._inbox or self._stopping or scheduler.has_work()):
                self._wakeup.wait()
            if self._stopping:
                return False
            inbox, self._inbox = self._inbox, []
        freed = []
        for submitted, stream in inbox:
            if submitted:
                scheduler.submit(stream)
            else:
                scheduler.cancel(stream)
                freed.append(stream)
        if freed and not self._post(self._deliver, [], freed):
            return False
        tokens = scheduler.step()
        return not tokens or self._post(self._deliver, tokens, [])

    def _post(self, call: Callable[..., None], *args: object) -> bool:
        """Have the event loop make a call. False when the loop is gone, and with it everybody who listened."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False
        return True
