"""/v1/embeddings: texts in, unit vectors out, bought in jobs of up to 32 short texts and put together in order."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from node.closing import closed_after
from node.gateway import errors
from node.gateway.errors import ApiError, Delivered
from node.gateway.fields import Fields, token_ids
from node.gateway.gate import Gate
from node.gateway.jobs import Head, Part, Purse, check_ids, failure
from node.gateway.limits import EMBED_JOBS, MAX_EMBED_TEXTS, MAX_EMBED_TOKENS
from node.gateway.models import Models
from node.gateway.price import Price, price_json, price_up
from node.gateway.replies import Progress
from node.gateway.requests import model_of
from node.gateway.terms import Terms, parse_terms
from node.gateway.text import TextCodec
from node.gateway.waiting import end
from node.ports import JobSpec, JobVectors, Marketplace
from protocol.errors import TallyError
from protocol.options import EMBED_INCREMENT_TOKENS, MAX_EMBED_INPUTS, JobOptions
from protocol.units import FinishReason, JobKind, Wei

MAX_DIMENSIONS: Final = 65_536
"""Largest vector that may be asked for. Unit: dimensions. Above every model's; the provider knows its own."""


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """One checked request. `inputs`: texts, or token ids as they are. `dimensions` 0: all. `floats`: a list of numbers
    each, else base64 of little-endian fp32."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int
    floats: bool
    terms: Terms
    stream: bool = False


def parse_embeddings(body: dict[str, Any]) -> EmbedCall:
    """An embeddings request. Raises: ApiError (400)."""
    fields = Fields(body)
    kind = fields.text("encoding_format") or "float"
    if kind not in ("float", "base64"):
        raise fields.fail("encoding_format", "must be float or base64")
    return EmbedCall(
        model=model_of(fields),
        inputs=_inputs(fields),
        dimensions=fields.integer("dimensions", 1, MAX_DIMENSIONS) or 0,
        floats=kind == "float",
        terms=parse_terms(fields),
    )


def _inputs(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    """A text, several, one list of token ids, or several."""
    value = fields.get("input")
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_EMBED_TEXTS:
        raise fields.fail("input", f"must be a text, token ids, or a list of at most {MAX_EMBED_TEXTS} of either")
    inputs: list[str | tuple[int, ...]] = []
    for index, item in enumerate(value):
        if not isinstance(item, str | list) or not item or len(item) > MAX_EMBED_TOKENS * 16:
            raise fields.fail(f"input[{index}]", "must be a text or a list of token ids, and not empty")
        inputs.append(item if isinstance(item, str) else token_ids(item, fields.name(f"input[{index}]")))
    return tuple(inputs)


@dataclass(frozen=True, slots=True)
class PreparedEmbeds:
    """A call as jobs, in order of its texts. `prices`: their worst cases."""

    call: EmbedCall
    specs: tuple[JobSpec, ...]
    prices: tuple[Price, ...]


@dataclass(slots=True)
class _Done:
    """One job's outcome so far."""

    progress: Progress
    vectors: list[bytes] = field(default_factory=list)


class Embeddings:
    """Prepares and runs embedding calls on one marketplace."""

    def __init__(self, marketplace: Marketplace, models: Models, gate: Gate, purse: Purse) -> None:
        self._marketplace = marketplace
        self._models = models
        self._gate = gate
        self._purse = purse

    async def prepare(self, call: EmbedCall) -> PreparedEmbeds:
        """Find the model and turn the texts into tokens. Raises: ApiError; nothing was sent or paid."""
        card, codec = await self._models.find(call.model)
        texts = await self._models.work(call.model, _encode, codec, call)
        for index, ids in enumerate(texts):
            if not 1 <= len(ids) <= card.max_context:
                said = f"input[{index}] has {len(ids)} tokens; this model takes 1 to {card.max_context} of each text."
                raise errors.invalid(f"input[{index}]", f"{said} Nothing was sent or paid.", "context_length_exceeded")
        total = sum(map(len, texts))
        if total > MAX_EMBED_TOKENS:
            said = f"The texts have {total} tokens; at most {MAX_EMBED_TOKENS} are taken at once."
            raise errors.invalid("input", f"{said} Nothing was sent or paid. Send fewer texts.", "too_many_tokens")
        specs = self._specs(call, job_batches(texts))
        entries = await self._models.offers(call.model)
        return PreparedEmbeds(call, specs, tuple(price_up(entries, spec, card.profile_id) for spec in specs))

    def _specs(self, call: EmbedCall, batches: list[list[tuple[int, ...]]]) -> tuple[JobSpec, ...]:
        terms = call.terms
        ceiling = self._purse.ceiling(terms)
        total = sum(len(ids) for batch in batches for ids in batch)
        specs = []
        for batch in batches:
            prompt = tuple(token for ids in batch for token in ids)
            # A limit on the request is shared out by tokens, rounded down, so that all its jobs together keep it.
            share = None if ceiling is None else Wei(ceiling * len(prompt) // total)
            specs.append(
                JobSpec(
                    model=call.model,
                    prompt=prompt,
                    max_tokens=0,
                    options=JobOptions(inputs=tuple(map(len, batch)), dimensions=call.dimensions),
                    kind=JobKind.EMBED,
                    tier=int(terms.tier),
                    private=terms.private,
                    price_ceiling=share,
                    reservation=terms.reservation,
                    only=terms.only,
                )
            )
        return tuple(specs)

    async def answer(self, prepared: PreparedEmbeds) -> AsyncGenerator[Part, None]:
        """Run the jobs, a few at a time, and give the whole answer. Raises: ApiError; the other jobs are cancelled."""
        if prepared.call.terms.dry_run:
            yield Head({})
            yield _priced(prepared)
            return
        with self._gate.entered():
            done = [_Done(Progress(len(spec.prompt))) for spec in prepared.specs]
            slots = asyncio.Semaphore(EMBED_JOBS)
            tasks = [
                asyncio.ensure_future(self._run(spec, price, part, slots))
                for spec, price, part in zip(prepared.specs, prepared.prices, done, strict=True)
            ]
            try:
                await asyncio.gather(*tasks)
            except ApiError as exc:
                await end(*tasks)
                raise exc.for_delivered(_together(done)) from exc
            finally:
                await end(*tasks)
        yield Head(_headers(done))
        for piece in _reply(prepared.call, done):
            yield piece

    async def _run(self, spec: JobSpec, price: Price, done: _Done, slots: asyncio.Semaphore) -> None:
        async with slots:
            try:
                async with closed_after(self._marketplace.run(spec)) as job:
                    async for event in job:
                        done.progress.take(event)
                        if isinstance(event, JobVectors):
                            done.vectors += event.vectors
            except TallyError as exc:
                raise failure(exc, price) from exc
        if done.progress.done is None or done.progress.done.finish is not FinishReason.STOP:
            raise errors.from_finish(done.progress.done.finish if done.progress.done else FinishReason.ERROR)
        if len(done.vectors) != len(spec.options.inputs):
            raise errors.from_finish(FinishReason.ERROR)


def job_batches(texts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """The texts in order, as many to a job as it may hold."""
    batches: list[list[tuple[int, ...]]] = []
    room = 0
    for ids in texts:
        if not batches or len(batches[-1]) == MAX_EMBED_INPUTS or len(ids) > room:
            batches.append([])
            room = EMBED_INCREMENT_TOKENS
        batches[-1].append(ids)
        room -= len(ids)
    return batches


def _encode(codec: TextCodec, call: EmbedCall) -> list[tuple[int, ...]]:
    texts = []
    for index, item in enumerate(call.inputs):
        if isinstance(item, str):
            texts.append(codec.encode_text(item))
        else:
            check_ids(codec, item, f"input[{index}]")
            texts.append(item)
    return texts


def _together(done: Sequence[_Done]) -> Delivered:
    """What a request that failed had bought."""
    parts = [part.progress for part in done if part.progress.jobs]
    cost = sum(part.cost for part in parts)
    return Delivered(tuple(job for part in parts for job in part.jobs), parts[-1].provider if parts else None, cost)


def _headers(done: Sequence[_Done]) -> dict[str, str]:
    spent = [part.progress.done for part in done if part.progress.done is not None]
    headers = {
        "x-tally-job": ",".join(job for part in done for job in part.progress.jobs),
        "x-tally-provider": ",".join(dict.fromkeys(part.progress.provider or "" for part in done)),
        "x-tally-cost": str(sum(job.cost for job in spent)),
    }
    refund = sum(job.refund for job in spent)
    return {**headers, "x-tally-refund": str(refund)} if refund else headers


def _priced(prepared: PreparedEmbeds) -> bytes:
    """A dry run's answer: the jobs' worst cases together."""
    answers = [price_json(spec, price) for spec, price in zip(prepared.specs, prepared.prices, strict=True)]
    whole = {**answers[0], "offers": min(answer["offers"] for answer in answers)}
    whole["prompt_tokens"] = sum(answer["prompt_tokens"] for answer in answers)
    for name in ("least_wei", "most_wei"):
        costs = [answer[name] for answer in answers]
        whole[name] = None if None in costs else str(sum(map(int, costs)))
    return msgspec.json.encode(whole)


def _reply(call: EmbedCall, done: Sequence[_Done]) -> Iterator[bytes]:
    """The answer job by job: as text, many large vectors take ten times the memory they arrived in."""
    spent = [part.progress.done for part in done if part.progress.done is not None]
    tokens = sum(job.prompt_tokens for job in spent)
    tally = {
        "cost_wei": str(sum(job.cost for job in spent)),
        "refund_wei": str(sum(job.refund for job in spent)),
        "ste_micro": sum(job.ste_micro for job in spent),
        "providers": list(dict.fromkeys(part.progress.provider for part in done)),
        "jobs": [job for part in done for job in part.progress.jobs],
        "receipts": ["0x" + digest.hex() for job in spent for digest in job.receipts],
        "final": True,
    }
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "tally": tally}
    head = msgspec.json.encode({"object": "list", "model": call.model, "usage": usage})
    yield head[:-1] + b',"data":['
    index = 0
    for part in done:
        items = []
        for vector in part.vectors:
            item = {"object": "embedding", "index": index, "embedding": _shown(vector, call.floats)}
            items.append((b"," if index else b"") + msgspec.json.encode(item))
            index += 1
        yield b"".join(items)
    yield b"]}"


def _shown(vector: bytes, floats: bool) -> list[float] | str:
    if floats:
        return list(struct.unpack(f"<{len(vector) // 4}f", vector))
    return base64.b64encode(vector).decode()
