"""Providers whose engine does not compute what their profile says, or not as the job asks.

Each is the node's own TorchEngine under its profile's name; what it cheats at stands in its docstring.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from devnet.adversaries import weights
from devnet.adversaries.scheduling import CrookedScheduler, Speculating
from devnet.adversaries.standing_in import stand_in
from node.engine.compiled import kernels_for, open_decoder
from node.engine.decoder import Decoder
from node.engine.engine import Consumer, TokenStream, TorchEngine
from node.engine.generation import Generation
from node.engine.profile import profile_of
from node.engine.sampler import Draw
from node.engine.scheduler import Scheduler
from node.engine.spec import load_spec
from node.engine.weights import TORCH_DTYPES
from node.ports import EngineRequest, EngineToken
from protocol.sampling import noise_keys

TEMPERATURE_FACTOR: Final = 1.3
"""How much hotter `wrong-temperature` draws. T = 0.8 becomes 1.04, which few readers would notice."""

LOSSY_LOGITS: Final = 1.0
"""What a draft's score may lack and still be kept by `lossy-speculation`. Unit: logits. Doubling it keeps more drafts,
so is faster, and further from what was bought."""

ALTER_EVERY: Final = 48
"""`altered-token` puts another word at one position in so many: an advertiser's or a censor's rate."""

SHORTEST: Final = 16
"""Prompts of fewer tokens are not worth truncating. Unit: tokens."""

SILENT_AFTER: Final = 8
"""Tokens after which `late-and-silent` says nothing more. Unit: tokens."""

LATE_S: Final = 3.0
"""How late its first token is. Unit: s. Later than any tier promises on a devnet."""


class Doctored(TorchEngine):
    """Serves another model than its profile names; subclasses say which, by a doctored copy of the directory."""

    def __init__(self, model_dir: Path, *args: Any, **options: Any) -> None:
        self._claimed_dir = model_dir
        self._scratch = tempfile.TemporaryDirectory(prefix="tally-adversary-")
        super().__init__(self._doctor(model_dir, Path(self._scratch.name) / "model"), *args, **options)

    @staticmethod
    def _doctor(model_dir: Path, target: Path) -> Path:
        raise NotImplementedError

    def _load(self) -> Scheduler:
        scheduler = super()._load()
        self._profile = profile_of(self._claimed_dir, self._dtype, self._device.type)
        return scheduler


class SmallModel(Doctored):
    """Every other layer only: half the cost at the price of the whole. Fingerprints are the small model's."""

    @staticmethod
    def _doctor(model_dir: Path, target: Path) -> Path:
        return weights.half_the_layers(model_dir, target)


class LayerFewer(Doctored):
    """Leaves one layer out: a tenth cheaper, and hard to hear."""

    @staticmethod
    def _doctor(model_dir: Path, target: Path) -> Path:
        return weights.without_middle_layer(model_dir, target)


class Int8Weights(Doctored):
    """Weights rounded to 8 bits, computed in full precision: half the memory traffic, so twice as fast alone."""

    @staticmethod
    def _doctor(model_dir: Path, target: Path) -> Path:
        return weights.with_fewer_bits(model_dir, target, 8)


class Int4(Doctored):
    """Weights rounded to 4 bits: a quarter of the memory, so four times the model on the same machine."""

    @staticmethod
    def _doctor(model_dir: Path, target: Path) -> Path:
        return weights.with_fewer_bits(model_dir, target, 4)


class Int8W8A8(Int8Weights):
    """Weights and activations rounded to 8 bits: integer kernels, twice as fast at every batch size."""

    def _load(self) -> Scheduler:
        scheduler = super()._load()
        assert isinstance(self._decoder, Decoder)
        weights.round_inputs(self._decoder)
        return scheduler


class Crooked(TorchEngine):
    """The true model, whose tokens are not drawn as the job says. Subclasses override one of the two rules."""

    def _load(self) -> Scheduler:
        honest = super()._load()
        crooked = CrookedScheduler(honest._decoder, honest._sampler, self._memory.saved_bytes, self._draw, self._pick)
        crooked.pace = honest.pace
        return crooked

    def _draw(self, _: Generation, draw: Draw) -> Draw:
        return draw

    def _pick(self, _: Sequence[Generation], __: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return chosen


class WrongTemperature(Crooked):
    """Draws hotter than asked, for livelier looking answers or to have one setting for all streams of a batch."""

    def _draw(self, _: Generation, draw: Draw) -> Draw:
        return replace(draw, temperature_micro=round(draw.temperature_micro * TEMPERATURE_FACTOR))


class OwnRng(Crooked):
    """Draws with a seed of its own: it may try several and keep the answer that ends soonest, or that it likes."""

    def _draw(self, stream: Generation, draw: Draw) -> Draw:
        own = hashlib.sha256(b"own" + stream.request.seed).digest()
        position = len(stream.request.prompt) + stream.produced
        return replace(draw, keys=noise_keys(own, position)) if draw.temperature_micro else draw


class AlteredToken(Crooked):
    """One token in ALTER_EVERY is the second best instead: a name, a link, a word that somebody paid for."""

    def _pick(self, streams: Sequence[Generation], logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        rows = [row for row, stream in enumerate(streams) if stream.produced % ALTER_EVERY == ALTER_EVERY // 2]
        if not rows:
            return chosen
        others = logits[rows].scatter(-1, chosen[rows, None], -torch.inf)
        altered = chosen.clone()
        altered[rows] = others.argmax(-1)
        return altered


class TruncatedPrompt(Crooked):
    """Reads the later half of a prompt only: half the prefill and the memory, billed for the whole.

    It draws at the positions of the whole prompt, so that not its dice betray it but what it did not read.
    """

    def __init__(self, model_dir: Path, *args: Any, **options: Any) -> None:
        super().__init__(model_dir, *args, **options)
        self._lengths: dict[bytes, int] = {}

    async def submit(self, request: EngineRequest) -> TokenStream:
        """As the base, with less to read."""
        if len(request.prompt) < SHORTEST or request.options.continued:
            return await super().submit(request)
        self._lengths[request.seed] = len(request.prompt)
        return await super().submit(replace(request, prompt=request.prompt[len(request.prompt) // 2 :], salt=b""))

    def _draw(self, stream: Generation, draw: Draw) -> Draw:
        whole = self._lengths.get(stream.request.seed)
        if whole is None or not draw.temperature_micro:
            return draw
        return replace(draw, keys=noise_keys(stream.request.seed, whole + stream.produced))


class PaddedOutput(TorchEngine):
    """Goes on past the model's end and the job's stop tokens up to max_tokens: more tokens to bill."""

    def _enter(self, stream: Generation, consumer: Consumer) -> None:
        stream.stops = frozenset()
        super()._enter(stream, consumer)


class _Speculative(TorchEngine):
    """The true model judging what a 4-bit copy of it drafts."""

    tolerance: ClassVar[float]
    """By how many logits a draft's score may lack the best and still be kept; 0: it must be the very token."""

    @staticmethod
    def _draft(model_dir: Path, target: Path) -> Path:
        return weights.with_fewer_bits(model_dir, target, 4)

    def _load(self) -> Scheduler:
        honest = super()._load()
        with tempfile.TemporaryDirectory(prefix="tally-adversary-") as scratch, torch.inference_mode():
            folder = self._draft(self._model_dir, Path(scratch) / "draft")
            spec = load_spec(folder)
            kernels = kernels_for(
                self._compile, spec, TORCH_DTYPES[self._dtype], self._device, self._threads, self._cache_dir
            )
            sizes = (self._slots, self._memory.context, 0)
            draft = open_decoder(folder, spec, self._dtype, self._device, *sizes, kernels)
        speculating = Speculating(honest._decoder, honest._sampler, self._memory.saved_bytes, draft, self.tolerance)
        speculating.pace = honest.pace
        return speculating


class CoupledSpeculation(_Speculative):
    """Honest: a draft is kept only where the big model draws the same token. The output is the same, sooner."""

    tolerance = 0.0


class LossySpeculation(_Speculative):
    """Keeps drafts that are nearly as good: faster still, and no longer what was bought."""

    tolerance = LOSSY_LOGITS


class PrefillTrick(_Speculative):
    """A small model writes everything; the big one only reads it afterwards, for fingerprints that are true.

    Reading is many times cheaper than writing, and all that commits to activations alone is satisfied.
    """

    tolerance = math.inf

    @staticmethod
    def _draft(model_dir: Path, target: Path) -> Path:
        return weights.half_the_layers(model_dir, target)


class LateAndSilent(TorchEngine):
    """Takes the job and its slot, is late with the first token and then says nothing: it oversells its machine."""

    async def submit(self, request: EngineRequest) -> TokenStream:
        """As the base, read through a stream that dawdles."""
        return _Dawdling(await super().submit(request))


class _Dawdling(TokenStream):
    """A stream that comes late and breaks off without an end."""

    def __init__(self, inner: TokenStream) -> None:
        self._inner = inner
        self._given = 0

    def __aiter__(self) -> AsyncIterator[EngineToken]:
        return self

    async def __anext__(self) -> EngineToken:
        if self._given == 0:
            await asyncio.sleep(LATE_S)
        if self._given == SILENT_AFTER:
            await asyncio.Event().wait()
        self._given += 1
        return await self._inner.__anext__()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def __del__(self) -> None:
        """The inner stream lets go of its slot itself."""


def install(engine: type[TorchEngine]) -> None:
    """Have this process serve with `engine` wherever the node would open its own."""
    stand_in("node.engine.engine", "TorchEngine", engine)
