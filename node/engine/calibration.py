"""What honest work looks like to an audit: how far a replay may be from a generation of the same profile.

The same requests are generated in every way a provider may run them (batch sizes, prefix cache, threads, displaced and
computed again, chunks, compiled kernels or none) and replayed by both kinds of kernels; a token's numbers are the worst
of its replays. A quarter of the generations sets the thresholds, the rest says how often honest work passes them: the
rate granted to honest work is a confidence bound on numbers that had no part in choosing the thresholds.
"""

from __future__ import annotations

import asyncio
import json
import math
import platform
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from node.engine.compiled import kernels_for, make_sampler, open_decoder
from node.engine.decoder import DecoderBase
from node.engine.engine import SINGLE_THREAD_PARAMETERS
from node.engine.generation import Generation
from node.engine.profile import resolve_dtype, stored_parameters, versions, weights_root
from node.engine.replay import TorchReplayer
from node.engine.sampler import Sampler
from node.engine.scheduler import PREFILL_TOKENS, Scheduler
from node.engine.spec import ModelError, ModelSpec, load_spec, weight_files
from node.engine.thresholds import CALIBRATION_FILE, CALIBRATION_FORMAT, MAX_FLAG_PPM, Thresholds
from node.engine.weights import TORCH_DTYPES
from node.ports import EngineRequest, EngineToken, Replay, ReplayRequest, Sampling, Urgency
from protocol.options import NO_OPTIONS, JobOptions
from protocol.transcript import Row

TOKENS: Final = 32_000
"""Output tokens of a calibration. Unit: tokens. Without a flag among them they bound the honest rate at 290 ppm;
doubling it halves that bound and doubles the minutes."""

QUICK_TOKENS: Final = 2_500
"""The same for --quick, all variants with fewer tokens each. Without a flag they bound the honest rate at 2,700 ppm,
which costs an audit some hundred tokens more to be sure of a cheat."""

CONFIDENCE: Final = 0.999
"""Probability with which the true rate of honest flags is below what is granted. One calibration in a thousand grants
too little, and then only by a little; Ville's bound on false slashes holds for the rate granted."""

FIT_EVERY: Final = 4
"""One generation in this many sets the thresholds, the others test them."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Thresholds: `safety` times the honest `quantile`. The rate granted: that of numbers `room` times as large."""

    quantile: float
    safety: float
    room: float


RULES: Final = {"fp32": Rule(1.0, 8.0, 4.0), "bf16": Rule(0.997, 1.25, 1.25)}
"""Room is for other processors' kernels: noise that much larger is still granted. In fp32 noise is some 1e-5 and an
int8 copy is off by 1e-2, so eight times the largest honest number costs nothing. In bf16 every rounding is of the size
of int8's: on the demo model int8 weights beside bf16 arithmetic make the noise 1.65 times as large. So the threshold
lies inside the honest tail and a rate near 1 % is granted; int8 weights then show in some 1,500 tokens. At room 1.4 it
would take three times as many; at the 99.5th percentile a third fewer, and a short calibration is over the Court's
limit."""

FLOORS: Final = {"fp32": Thresholds(10, 1_000, 500, 100), "bf16": Thresholds(100, 20_000, 10_000, 100)}
"""Least thresholds and least rate granted, however small the noise that was seen. In fp32 that is 4e-6 nats and 4e-6 of
the projection's length at most, so a hundred times as much is left for kernels not measured here; int8 weights are off
by 3e-3 of the length at nearly every token. In bf16: a few roundings of a logit."""

CEILING: Final = Thresholds(1_000, 500_000, 200_000, MAX_FLAG_PPM)
"""Largest thresholds. Beyond them a fingerprint tells nothing apart."""

PROMPT_TOKENS: Final = (4, 96)
OUTPUT_TOKENS: Final = (16, 64)
"""Lengths of what is generated. Unit: tokens. Long enough for several cache blocks and a leaf or two; the least output
is for calibrations of few tokens, whose batches must be full all the same."""

CONTEXT: Final = 512
"""Context of the slots. Unit: tokens."""

POOL_BLOCKS: Final = 64
"""Blocks of the prefix cache. Enough that the variant with a common prefix hits it."""

URGENT_EVERY: Final = 7
"""Steps between two urgent streams in the crowded variant."""

_SALT: Final = bytes(32)
_PENALISED: Final = JobOptions(frequency_milli=500, presence_milli=300)
HOWS: Final = (
    Sampling(0),
    Sampling(700_000, 950_000),
    Sampling(1_000_000),
    Sampling(1_300_000, 900_000, 40),
)

_Floats = npt.NDArray[np.float64]
_Say = Callable[[str, int, int], None]
_Made = tuple[EngineRequest, tuple[Row, ...]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One honest way to run a batch. `chunk`: prompt tokens a step. `crowded`: urgent work displaces the rest."""

    name: str
    compiled: str
    threads: int = 1
    slots: int = 8
    chunk: int = PREFILL_TOKENS
    cached: bool = False
    crowded: bool = False


_WAYS: Final[tuple[dict[str, Any], ...]] = (
    {"name": "alone", "slots": 1},
    {"name": "batch of 8", "slots": 8},
    {"name": "batch of 16", "slots": 16},
    {"name": "prefix cache", "cached": True},
    {"name": "displaced", "slots": 4, "crowded": True},
    {"name": "chunks of 16", "chunk": 16},
    {"name": "two threads", "threads": 2},
)
VARIANTS: Final = tuple(Variant(compiled=kind, **way) for kind in ("on", "off") for way in _WAYS)


@dataclass(frozen=True, slots=True)
class Numbers:
    """What replays said of some tokens, one number each; `routing`: 0 where the experts are the same, else 1."""

    margins: _Floats
    logprobs: _Floats
    projections: _Floats
    routing: _Floats

    @classmethod
    def of(cls, found: Iterable[Replay]) -> Numbers:
        """All tokens of some replays."""
        replays = list(found)

        def joined(values: Iterable[Sequence[float]]) -> _Floats:
            return np.array([number for part in values for number in part], dtype=np.float64)

        return cls(
            joined(replay.margins for replay in replays),
            joined(replay.logprobs for replay in replays),
            joined(replay.projections for replay in replays),
            joined([float(not same) for same in replay.routing] for replay in replays),
        )

    def louder(self, times: float) -> Numbers:
        """As they would be with that much more noise."""
        return Numbers(times * self.margins, times * self.logprobs, times * self.projections, self.routing)

    def flagged(self, limits: Thresholds) -> npt.NDArray[np.bool_]:
        """[tokens]: whether an audit under these thresholds flags it."""
        return (
            (self.margins > limits.margin_milli / 1e3)
            | (self.logprobs > limits.logprob_micro / 1e6)
            | (self.projections > limits.projection_micro / 1e6)
            | (self.routing > 0)
        )


def fitted(honest: Numbers, dtype: str) -> Thresholds:
    """Thresholds for work as honest as this; the rate is left at its floor."""
    low, rule = FLOORS[dtype], RULES[dtype]

    def limit(values: _Floats, unit: float, least: int, most: int) -> int:
        finite = values[np.isfinite(values)]
        usual = float(np.quantile(finite, rule.quantile)) if len(finite) else 0.0
        return max(least, min(most, math.ceil(rule.safety * usual * unit)))

    return Thresholds(
        limit(honest.margins, 1e3, low.margin_milli, CEILING.margin_milli),
        limit(honest.logprobs, 1e6, low.logprob_micro, CEILING.logprob_micro),
        limit(honest.projections, 1e6, low.projection_micro, CEILING.projection_micro),
        low.flag_ppm,
    )


def rate_bound(flags: int, tokens: int, confidence: float = CONFIDENCE) -> float:
    """Upper confidence bound on a rate after `flags` of `tokens`. Source: Clopper and Pearson 1934, the exact interval.

    The rate at which so few flags, or fewer, would be seen with probability 1 - confidence.
    """
    if flags >= tokens:
        return 1.0
    ways = [math.lgamma(tokens + 1) - math.lgamma(k + 1) - math.lgamma(tokens - k + 1) for k in range(flags + 1)]
    low, high = flags / tokens, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        inside, out = math.log(rate), math.log1p(-rate)
        seen = math.fsum(math.exp(way + k * inside + (tokens - k) * out) for k, way in enumerate(ways))
        low, high = (rate, high) if seen > 1 - confidence else (low, rate)
    return high


async def calibrate(
    model_dir: Path,
    dtype: str = "auto",
    tokens: int = TOKENS,
    seed: int = 1,
    say: _Say = lambda *_: None,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """Measure a model directory on this machine's CPU; what CALIBRATION_FILE holds for the dtype.

    `say`: told what is being done, tokens generated or replayed so far, and how many in all.
    Raises: ModelError, also when honest work is flagged more often than the Court lets a profile grant.
    """
    lab = _Lab(model_dir, dtype, seed, tokens, say, variants)
    made = await lab.generate_all()
    found = await lab.replay_all([pair for pairs in made.values() for pair in pairs])
    fit = Numbers.of(replay for i, replay in enumerate(found) if i % FIT_EVERY == 0)
    held = Numbers.of(replay for i, replay in enumerate(found) if i % FIT_EVERY)
    limits = fitted(fit, lab.dtype)
    flags = int(held.louder(RULES[lab.dtype].room).flagged(limits).sum())
    bound = rate_bound(flags, len(held.margins))
    limits = replace(limits, flag_ppm=max(limits.flag_ppm, math.ceil(1e6 * bound)))
    if limits.flag_ppm > MAX_FLAG_PPM:
        raise ModelError(
            f"{flags} of {len(held.margins)} honest tokens of {model_dir} would be flagged, so that {limits.flag_ppm} "
            f"per million had to be granted and the Court accepts {MAX_FLAG_PPM}: use fp32, or more --tokens"
        )
    other = await lab.other_dtype(limits)
    return {
        "versions": versions(),
        "thresholds": asdict(limits),
        "tokens": {"fit": len(fit.margins), "held": len(held.margins)},
        "held": {
            "flags": int(held.flagged(limits).sum()),
            "flags_with_room": flags,
            "rate_bound_ppm": math.ceil(1e6 * bound),
            "confidence": CONFIDENCE,
            "voids": int((held.margins >= 2).sum()),
        },
        "honest": _spread(Numbers.of(found)),
        "variants": _by_variant(made, found),
        "other_dtype": other,
        "measured_on": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "llguidance": version("llguidance"),
            "kernels": "on" in lab.kinds,
            "seed": seed,
        },
    }


class _Lab:
    """Generates and replays for one calibration."""

    def __init__(
        self,
        model_dir: Path,
        dtype: str,
        seed: int,
        tokens: int,
        say: _Say,
        variants: Sequence[Variant],
    ) -> None:
        self._dir, self._spec, self._say = model_dir, load_spec(model_dir), say
        total = stored_parameters(weight_files(model_dir))
        self.dtype = resolve_dtype(dtype, total)
        self._threads = 1 if total < SINGLE_THREAD_PARAMETERS else torch.get_num_threads()
        self.kinds = _kinds(self._spec, TORCH_DTYPES[self.dtype])
        self._variants = [variant for variant in variants if variant.compiled in self.kinds]
        self._rng = random.Random(seed)
        self._context = min(CONTEXT, self._spec.max_positions)
        self._texts: list[tuple[int, ...]] = []
        self._tokens, self._done, self._all = tokens, 0, tokens * (1 + len(self.kinds))

    async def generate_all(self) -> dict[Variant, list[_Made]]:
        """Every variant's share of the tokens."""
        made: dict[Variant, list[_Made]] = {}
        share = -(-self._tokens // len(self._variants))
        for compiled in self.kinds:
            for threads in (1, 2):
                group = [v for v in self._variants if (v.compiled, v.threads) == (compiled, threads)]
                if not group:
                    continue
                decoder, sampler = self._open(self.dtype, compiled, threads)
                for variant in group:
                    self._say(f"generating: {variant.name}, kernels {compiled}", self._done, self._all)
                    made[variant] = await self._generate(decoder, sampler, variant, share)
        return made

    async def replay_all(self, pairs: Sequence[_Made]) -> list[Replay]:
        """The worst of what each kind of kernels says of each generation."""
        found: list[Replay] = []
        for kind in self.kinds:
            replayer = TorchReplayer(self._dir, self.dtype, self._threads, compile_option=kind)
            await replayer.start()
            try:
                looked = []
                for request, rows in pairs:
                    self._say(f"replaying: kernels {kind}", self._done, self._all)
                    looked.append(await replayer.replay(_again(request, rows)))
                    self._done += len(rows)
            finally:
                await replayer.stop()
            found = [_worst(a, b) for a, b in zip(found, looked, strict=True)] if found else looked
        return found

    async def other_dtype(self, limits: Thresholds) -> dict[str, Any]:
        """How often the same weights in the other dtype would be flagged: told, and no part of the calibration."""
        dtype = next(name for name in TORCH_DTYPES if name != self.dtype)
        kind = self.kinds[0]
        share = max(64, self._tokens // 32)
        made = await self._generate(*self._open(dtype, kind, 1), Variant("other dtype", kind), share)
        numbers = Numbers.of(await self.replay_all(made))
        return {"dtype": dtype, "tokens": len(numbers.margins), "flags": int(numbers.flagged(limits).sum())}

    def _open(self, dtype: str, compiled: str, threads: int) -> tuple[DecoderBase, Sampler]:
        """`threads`: 1 for as many as an engine would take."""
        count = self._threads if threads == 1 else 2 if self._threads == 1 else max(1, self._threads // 2)
        torch.set_num_threads(count)
        spec, device, slots = self._spec, torch.device("cpu"), max(variant.slots for variant in VARIANTS)
        with torch.inference_mode():
            kernels = kernels_for(compiled, spec, TORCH_DTYPES[dtype], device, count, None)
            decoder = open_decoder(self._dir, spec, dtype, device, slots, self._context, POOL_BLOCKS, kernels)
        return decoder, make_sampler(spec.vocab, spec.hidden, device, kernels)

    async def _generate(self, decoder: DecoderBase, sampler: Sampler, variant: Variant, tokens: int) -> list[_Made]:
        made: list[_Made] = []
        done = 0
        while done < tokens:
            await asyncio.sleep(0)  # where Ctrl-C is heard
            most = min(OUTPUT_TOKENS[1], max(OUTPUT_TOKENS[0], (tokens - done) // variant.slots))
            requests = [self._request(variant, most) for _ in range(variant.slots * (3 if variant.crowded else 1))]
            for request, rows in _run(decoder, sampler, variant, requests):
                made.append((request, rows))
                self._texts.append((*request.prompt, *(row.token_id for row in rows)))
                done += len(rows)
        self._done += done
        return made

    def _request(self, variant: Variant, output: int) -> EngineRequest:
        """Every other prompt is of text the model wrote, for noise alone keeps a model unsure of everything."""
        rng, vocab = self._rng, self._spec.vocab
        length = rng.randint(*PROMPT_TOKENS)
        prompt = tuple(rng.randrange(vocab) for _ in range(length))
        if self._texts and rng.random() < 0.5:
            prompt = rng.choice(self._texts[-64:])[-length:]
        if variant.cached and self._texts:
            prompt = (*(self._texts[0] * length)[: length + PROMPT_TOKENS[0]], *prompt)
        options = rng.choice((NO_OPTIONS, NO_OPTIONS, NO_OPTIONS, _PENALISED))
        salt, most = _SALT if variant.cached else b"", self._context - output
        return EngineRequest(prompt[-most:], rng.randbytes(32), output, rng.choice(HOWS), options, salt=salt)


def _kinds(spec: ModelSpec, dtype: torch.dtype) -> tuple[str, ...]:
    """The kinds of kernels this machine has."""
    try:
        kernels_for("on", spec, dtype, torch.device("cpu"), 1, None)
    except ModelError:
        return ("off",)
    return "on", "off"


def _run(
    decoder: DecoderBase, sampler: Sampler, variant: Variant, requests: Sequence[EngineRequest]
) -> list[tuple[EngineRequest, tuple[Row, ...]]]:
    """All requests to their ends. In a crowded variant every third is urgent and comes while others run."""
    decoder.slots = variant.slots
    # room for some of the displaced streams, so that others are computed again
    saved = PROMPT_TOKENS[1] * decoder.kv.token_bytes if variant.crowded else 0
    scheduler = Scheduler(decoder, sampler, saved)
    urgent = [replace(r, urgency=Urgency.PRIORITY) for r in requests[::3]] if variant.crowded else []
    calm = [r for i, r in enumerate(requests) if i % 3] if variant.crowded else list(requests)
    made: dict[Generation, list[Row]] = {}

    def submit(request: EngineRequest) -> None:
        stream = Generation(request, decoder.spec.eos_ids)
        made[stream] = []
        scheduler.submit(stream)

    for request in calm:
        submit(request)
    steps = 0
    with torch.inference_mode():
        while scheduler.has_work() or urgent:
            if urgent and (steps % URGENT_EVERY == URGENT_EVERY - 1 or not scheduler.has_work()):
                submit(urgent.pop())
            scheduler.chunk = min(scheduler.chunk, variant.chunk)
            steps += 1
            for stream, outcome in scheduler.step():
                if isinstance(outcome, EngineToken):
                    made[stream].append(Row(outcome.token_id, outcome.logprob, outcome.projection, outcome.routing))
                    stream.taken = stream.produced
                elif isinstance(outcome, Exception):
                    raise ModelError(f"a generation of the calibration failed: {outcome}") from outcome
    return [(stream.request, tuple(rows)) for stream, rows in made.items()]


def _again(request: EngineRequest, rows: tuple[Row, ...]) -> ReplayRequest:
    return ReplayRequest(request.prompt, rows, request.seed, request.sampling, request.options)


def _worst(one: Replay, other: Replay) -> Replay:
    """Of two replays of one generation, the larger numbers."""

    def larger(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
        return tuple(map(max, a, b))

    return Replay(
        larger(one.margins, other.margins),
        larger(one.logprobs, other.logprobs),
        larger(one.projections, other.projections),
        tuple(a and b for a, b in zip(one.routing, other.routing, strict=True)),
        larger(one.gaps, other.gaps),
        one.ends,
    )


def _spread(numbers: Numbers) -> dict[str, dict[str, float]]:
    """How each number is distributed; infinite ones are counted and left out of the rest."""
    out = {}
    for name in ("margins", "logprobs", "projections"):
        values: _Floats = getattr(numbers, name)
        finite = values[np.isfinite(values)]
        points = np.quantile(finite, (0.5, 0.99, 0.999, 1.0)) if len(finite) else np.zeros(4)
        told = dict(zip(("p50", "p99", "p999", "max"), (float(f"{point:.3g}") for point in points), strict=True))
        out[name] = {**told, "infinite": float(len(values) - len(finite))}
    out["routing"] = {"changed": float(numbers.routing.sum())}
    return out


def _by_variant(made: dict[Variant, list[_Made]], found: Sequence[Replay]) -> list[dict[str, Any]]:
    out, at = [], 0
    for variant, pairs in made.items():
        numbers = Numbers.of(found[at : at + len(pairs)])
        at += len(pairs)
        largest = {name: values["max"] for name, values in _spread(numbers).items() if "max" in values}
        out.append({"name": variant.name, "kernels": variant.compiled, "tokens": len(numbers.margins), **largest})
    return out


def with_entry(before: dict[str, Any] | None, model_dir: Path, dtype: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The file's content with the entry of one dtype; others are kept when they are of the same weights."""
    weights = "0x" + weights_root(model_dir).hex()
    kept = before.get("dtypes", {}) if before and before.get("weights_root") == weights else {}
    return {"format": CALIBRATION_FORMAT, "weights_root": weights, "dtypes": {**kept, dtype: entry}}


def write(model_dir: Path, content: dict[str, Any]) -> Path:
    """Replace CALIBRATION_FILE as a whole. Raises: ModelError when the directory cannot be written."""
    path = model_dir / CALIBRATION_FILE
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)
    except OSError as exc:
        raise ModelError(f"{path} cannot be written ({exc.strerror}): make the directory yours to write") from exc
    return path
