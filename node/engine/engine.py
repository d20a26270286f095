"""The engine port over the torch decoder: a thread that steps the scheduler, and streams that asyncio consumes.

Contract: every submitted stream ends exactly once: with a token that has a finish reason, with EngineError, or by its
consumer's aclose. Tokens of one step reach the event loop in one call. A stream that is not consumed pauses after
RUN_AHEAD tokens and holds its slot; nothing is ever dropped.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import torch

from node.engine.checks import check_inputs, check_request
from node.engine.compiled import COMPILE, kernels_for, make_sampler, open_decoder
from node.engine.decoder import DecoderBase
from node.engine.generation import RESUME_AT, EngineError, Generation, embedding
from node.engine.grammar import Grammars
from node.engine.memory import KV_BUDGET_BYTES, plan_memory
from node.engine.pace import Pace
from node.engine.profile import profile_of, resolve_dtype, stored_parameters
from node.engine.scheduler import Outcome, Scheduler, out_of_memory
from node.engine.spec import ModelError, load_spec, weight_files
from node.engine.waiting import queue_limit
from node.engine.weights import TORCH_DTYPES
from node.ports import EngineFull, EngineRequest, EngineStats, EngineToken, Urgency
from protocol.errors import LocalProtocolError
from protocol.messages import Profile
from protocol.options import Syntax
from protocol.units import FinishReason, Verifiability

SINGLE_THREAD_PARAMETERS: Final = 200_000_000
"""Below this size one CPU thread computes unless told otherwise. Unit: parameters. Kernels of small models take
microseconds, less than threads need to meet; beside other work, two threads were measured a hundred times slower."""

EMBED_AT_ONCE: Final = 8
"""Texts of one embedding job that are in the engine together. Unit: texts. Enough short ones to fill a step; doubling
it doubles the slots one job can take from others of its class."""

WARM_UP_TOKENS: Final = 32
"""Length of the text that is read at start, so that the first request finds measured times and warm kernels. Unit:
tokens. Doubling it doubles that part of the start, some seconds for a large model on a CPU."""

_log = logging.getLogger(__name__)


class Consumer(Protocol):
    """Whoever waits for what a stream gives. Called on the event loop."""

    def _put(self, outcome: EngineToken | bytes) -> None: ...

    def _end(self, error: EngineError | None) -> None:
        """Nothing more will come; `error` None: it was cancelled and its slot is free."""
        ...


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

    def _put(self, outcome: EngineToken | bytes) -> None:
        assert isinstance(outcome, EngineToken)
        if not self._closed:
            self._ready.append(outcome)
        if outcome.finish is not FinishReason.OPEN:
            self._freed.set()
        self._arrived.set()

    def _end(self, error: EngineError | None) -> None:
        self._error = error
        self._freed.set()
        self._arrived.set()


class _Embedded:
    """One text of an embedding job."""

    def __init__(self) -> None:
        self.vector: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def _put(self, outcome: EngineToken | bytes) -> None:
        assert isinstance(outcome, bytes)
        if not self.vector.done():
            self.vector.set_result(outcome)

    def _end(self, error: EngineError | None) -> None:
        if error is None:
            self.vector.cancel()
        elif not self.vector.done():
            self.vector.set_exception(error)


class TorchEngine:
    """Serves one model directory. See node.ports.Engine.

    `dtype`: auto, bf16 or fp32 (auto: fp32 on a CPU up to AUTO_FP32_PARAMETERS, else bf16). `max_context` None: what
    the model was made for, or what the KV budget holds. `threads` None: 1 below SINGLE_THREAD_PARAMETERS, else all
    cores. `max_queue`: streams that may wait for a slot, shared out by urgency (waiting.py). `device`: a torch device.
    `compile_option`: off, auto or on (see compiled.py); `cache_dir`: where compiled kernels are kept between starts,
    None for the user's cache.

    Raises: ModelError from the constructor for a directory, device or sizes that cannot be served.
    """

    verifiability = Verifiability.REPLAY

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
        compile_option: str = "auto",
        cache_dir: Path | None = None,
    ) -> None:
        if compile_option not in COMPILE:
            raise ModelError(f"compile {compile_option!r} is not one of {', '.join(COMPILE)}")
        if slots < 1 or max_queue < 0:
            raise ModelError(f"slots must be at least 1 and max_queue at least 0, got {slots} and {max_queue}")
        self._spec = load_spec(model_dir)
        total = stored_parameters(weight_files(model_dir))
        self._model_dir, self._device = model_dir, open_device(device)
        self._compile, self._cache_dir = compile_option, cache_dir
        self._dtype = resolve_dtype(dtype, total, self._device.type)
        self._slots, self._max_queue = slots, max_queue
        self._memory = plan_memory(self._spec, self._dtype, slots, max_context, kv_budget_bytes)
        self._threads = threads or (1 if total < SINGLE_THREAD_PARAMETERS else torch.get_num_threads())
        self._grammars = Grammars(model_dir / "tokenizer.json", self._spec.vocab, self._spec.eos_ids)
        self._profile: Profile | None = None
        self._decoder: DecoderBase | None = None
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wakeup = threading.Condition()  # guards the two below
        self._inbox: list[tuple[bool, Generation]] = []  # (submitted, else cancelled)
        self._stopping = False
        self._streams: dict[Generation, weakref.ref[Consumer]] = {}  # open ones; used on the event loop only

    @property
    def profile(self) -> Profile:
        """Raises: LocalProtocolError before `start`, which computes it."""
        if self._profile is None:
            raise LocalProtocolError("the engine has no profile before it is started")
        return self._profile

    @property
    def max_context(self) -> int:
        return self._memory.context

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab

    @property
    def hidden_size(self) -> int:
        return self._spec.hidden

    # -------------------------------------------------------------------------------------------- on the event loop

    async def start(self) -> None:
        """Load the weights and start the thread. Raises: ModelError; LocalProtocolError when already started."""
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

    async def submit(self, request: EngineRequest) -> TokenStream:
        """Raises: EngineFull; ValueError; EngineError when the engine is not running."""
        self._require_running()
        check_request(request, self._spec, self._memory.context)
        self._require_place(request.urgency)
        matcher = None
        if request.options.syntax is not Syntax.NONE:
            continued = request.prompt[len(request.prompt) - request.options.continued :]
            matcher = await self._grammars.matcher(request.options, continued)
            self._require_running()
            self._require_place(request.urgency)
        stream = Generation(request, self._spec.eos_ids, matcher)
        consumer = TokenStream(self, stream)
        self._enter(stream, consumer)
        return consumer

    async def embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int, urgency: Urgency) -> tuple[bytes, ...]:
        """Raises: EngineFull; ValueError; EngineError when the engine is not running, stops or fails."""
        self._require_running()
        check_inputs(inputs, dimensions, self._spec, self._memory.context)
        self._require_place(urgency)
        places = asyncio.Semaphore(EMBED_AT_ONCE)

        async def one(ids: tuple[int, ...]) -> bytes:
            async with places:
                self._require_running()
                stream, consumer = embedding(ids, dimensions, urgency), _Embedded()
                self._enter(stream, consumer)
                try:
                    return await consumer.vector
                finally:
                    if stream in self._streams:
                        self._cancel(stream)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(ids)) for ids in inputs]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return tuple(task.result() for task in tasks)

    def wait_ms(self, urgency: Urgency, prompt_tokens: int) -> int:
        scheduler = self._scheduler
        if scheduler is None:
            return 0
        wait = scheduler.pace.first_token_s(self._streams, self._slots, scheduler.chunk, urgency, prompt_tokens)
        return math.ceil(1000 * wait)

    def stats(self) -> EngineStats:
        scheduler, decoder = self._scheduler, self._decoder
        if scheduler is None or decoder is None:
            return EngineStats(self._slots, 0, 0, 0, 0)
        return EngineStats(
            slots=self._slots,
            active=scheduler.active,
            queued=sum(stream.waiting for stream in self._streams),
            kv_bytes=decoder.kv.bytes,
            tokens_total=scheduler.tokens_total,
            prompt_total=scheduler.prompt_total,
            cached_total=scheduler.cached_total,
            preempted_total=scheduler.preempted_total,
            busy_s=scheduler.pace.busy_s,
        )

    def _require_running(self) -> None:
        if self._thread is None or self._stopping:
            raise EngineError("the engine is not running: start it first, or see its log for why it stopped")

    def _require_place(self, urgency: Urgency) -> None:
        """Raises: EngineFull when all slots are taken and the queue is as full as this class may find it."""
        limit = queue_limit(urgency, self._max_queue)
        if len(self._streams) >= self._slots + limit:
            raise EngineFull(
                f"all {self._slots} slots are taken and {len(self._streams) - self._slots} requests wait: "
                f"{urgency.name.lower()} ones queue up to {limit} of {self._max_queue} queue places; try again later"
            )

    def _enter(self, stream: Generation, consumer: Consumer) -> None:
        self._streams[stream] = weakref.ref(consumer)
        self._tell(True, stream)

    def _deliver(self, outcomes: list[Outcome], freed: list[Generation]) -> None:
        """On the event loop: hand out what one step gave and confirm cancellations."""
        for stream, outcome in outcomes:
            is_open = isinstance(outcome, EngineToken) and outcome.finish is FinishReason.OPEN
            reference = self._streams.get(stream) if is_open else self._streams.pop(stream, None)
            consumer = reference() if reference is not None else None
            if consumer is None:
                continue
            if isinstance(outcome, EngineError):
                consumer._end(outcome)
            else:
                consumer._put(outcome)
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
        memory = self._memory
        try:
            with torch.inference_mode():
                dtype, sizes = TORCH_DTYPES[self._dtype], (self._slots, memory.context, memory.pool_blocks)
                kernels = kernels_for(self._compile, self._spec, dtype, self._device, self._threads, self._cache_dir)
                self._decoder = open_decoder(self._model_dir, self._spec, self._dtype, self._device, *sizes, kernels)
                sampler = make_sampler(self._spec.vocab, self._spec.hidden, self._device, kernels)
                scheduler = Scheduler(self._decoder, sampler, memory.saved_bytes)
                scheduler.pace = self._warm_up(Scheduler(self._decoder, sampler))
                return scheduler
        except (RuntimeError, MemoryError) as exc:
            if not out_of_memory(exc):
                raise
            raise ModelError(
                f"there is no memory for the weights, {memory.slot_bytes} bytes of slots and {memory.pool_bytes} of "
                f"prefix cache ({exc}): lower the KV budget or slots, or take a smaller model"
            ) from exc

    def _warm_up(self, scheduler: Scheduler) -> Pace:
        """Run a short stream through a scheduler of its own; the times it took."""
        torch.set_num_threads(self._threads)
        length = min(WARM_UP_TOKENS, self._memory.context - 4)
        if length > 0:
            scheduler.submit(Generation(EngineRequest((0,) * length, bytes(32), 4), ()))
            while scheduler.has_work():
                scheduler.step()
        pace = Pace()
        pace.step_s, pace.read_s = scheduler.pace.step_s, scheduler.pace.read_s
        return pace

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
        outcomes = scheduler.step()
        return not outcomes or self._post(self._deliver, outcomes, [])

    def _post(self, call: Callable[..., None], *args: object) -> bool:
        """Have the event loop make a call. False when the loop is gone, and with it everybody who listened."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return False
        return True


def open_device(name: str) -> torch.device:
    """Raises: ModelError for a device that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise ModelError(f"device {name!r} cannot be used here ({exc}): use cpu, or install its torch") from exc
    return device
