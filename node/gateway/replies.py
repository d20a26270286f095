"""The JSON that OpenAI's clients expect back: whole answers, stream chunks, usage.

Every chunk of a stream carries the same id, object, created and model; exactly one carries a finish_reason. What only
a marketplace knows (job, provider, cost, receipts) stands in `usage.tally` and in x-tally-* headers, where clients that
do not know it pass it by.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from node.gateway import errors
from node.gateway.detokenise import Alternative, TokenText
from node.gateway.errors import Delivered
from node.gateway.reading import Part
from node.gateway.requests import Call, Kind
from node.gateway.tool_text import CallDelta, ToolForm
from node.ports import JobDone, JobEvent, JobOutside, JobPaid, JobStarted, JobTokens, MarketEntry, ModelCard
from protocol.tariff import tier_terms
from protocol.units import FinishReason, Tier

DONE: Final = b"data: [DONE]\n\n"
KEEPALIVE: Final = b": keep-alive\n\n"
"""A comment: readers of event streams skip it, and proxies see that the connection lives."""

_FINISH: Final = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}
"""The ends that OpenAI's finish_reason knows. Every other end is an error."""


@dataclass(slots=True)
class Progress:
    """What is known of a running job. `cost`: wei vouched for. `tokens`: delivered, `reasoning_tokens` of them thought.

    `done`: once it was receipted.
    """

    prompt_tokens: int
    jobs: list[str] = field(default_factory=list)
    provider: str | None = None
    cost: int = 0
    tokens: int = 0
    reasoning_tokens: int = 0
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    done: JobDone | None = None

    def take(self, event: JobEvent) -> None:
        """Take one event of the job into account."""
        match event:
            case JobStarted():
                self.jobs.append("0x" + event.job_id.hex())
                self.provider = "0x" + event.provider.hex()
            case JobOutside():
                self.provider = f"exchange:{event.host}"
            case JobPaid():
                self.cost = event.total
            case JobDone():
                self.done = event
                self.cost = event.cost
            case JobTokens():
                self.tokens += len(event.token_ids)

    def end(self) -> str:
        """OpenAI's finish_reason for a job that ended by itself. Raises: ApiError when it did not end well."""
        finish = self.done.finish if self.done is not None else FinishReason.ERROR
        if finish not in _FINISH:
            raise errors.from_finish(finish).for_delivered(self.delivered())
        return _FINISH[finish]

    def delivered(self) -> Delivered:
        return Delivered(tuple(self.jobs), self.provider, self.cost, self.tokens, "".join(self.text))

    def headers(self) -> dict[str, str]:
        """Who serves this, as far as is known when the headers go out."""
        headers = {"x-tally-job": ",".join(self.jobs), "x-tally-provider": self.provider or ""}
        return {name: value for name, value in headers.items() if value}

    def cost_headers(self) -> dict[str, str]:
        """What it came to, for an answer that is whole. A refund: the tier's promise was missed."""
        headers = {"x-tally-cost": str(self.done.cost if self.done else self.cost)}
        return {**headers, "x-tally-refund": str(self.done.refund)} if self.done and self.done.refund else headers

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage, from the final receipt where there is one.

        `tally.final` is false when a stop string ended the stream on this side: then the counts are of what arrived,
        and the closing voucher may add at most one increment of 32 tokens to the cost.
        """
        done = self.done
        prompt = done.prompt_tokens if done else self.prompt_tokens
        completion = done.completion_tokens if done else self.tokens
        reasoning = done.reasoning_tokens if done else self.reasoning_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens if done else 0},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
            "tally": {
                "cost_wei": str(done.cost if done else self.cost),
                "refund_wei": str(done.refund if done else 0),
                "ste_micro": done.ste_micro if done else 0,
                "provider": self.provider,
                "jobs": self.jobs,
                "receipts": ["0x" + digest.hex() for digest in done.receipts] if done else [],
                "final": done is not None,
            },
        }


class Reply:
    """One answer's shape, for either endpoint. `token`: the random part of its id. `created`: Unix seconds.

    `form`: how the model writes calls, None where none are looked for.
    """

    def __init__(self, call: Call, card: ModelCard, form: ToolForm | None, *, token: str, created: int) -> None:
        self._call = call
        self._chat = call.kind is Kind.CHAT
        self._form = form
        self._token = token
        self.id = f"{call.kind.value}-{token}"
        self._common: dict[str, Any] = {
            "id": self.id,
            "created": created,
            "model": call.model,
            "system_fingerprint": "fp_" + card.profile_id.hex()[:16],
            "service_tier": call.terms.service_tier,
        }

    # -------------------------------------------------------------------------------------------------- whole

    def whole(self, parts: Sequence[Part], progress: Progress) -> bytes:
        """The answer to a request that asked for no stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": progress.finish_reason, "logprobs": None}
        if self._chat:
            choice["message"] = self._message(parts)
        else:
            choice["text"] = "".join(part.text for part in parts)
        if self._call.top_logprobs is not None:
            choice["logprobs"] = self._logprobs([token for part in parts for token in part.tokens])
        kind = "chat.completion" if self._chat else "text_completion"
        return msgspec.json.encode(
            {**self._common, "object": kind, "choices": [choice], "usage": progress.usage()},
        )

    def _message(self, parts: Sequence[Part]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        reasoning = "".join(part.reasoning for part in parts)
        calls: list[dict[str, Any]] = []
        for delta in (delta for part in parts for delta in part.calls):
            if delta.index == len(calls):
                function = {"name": delta.name, "arguments": ""}
                calls.append({"id": self._call_id(delta.index), "type": "function", "function": function})
            calls[delta.index]["function"]["arguments"] += delta.arguments
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    # ------------------------------------------------------------------------------------------------- stream

    def opening(self) -> bytes:
        """The first chunk of a chat: whose turn it is. A text completion has none."""
        return self._chunk({"role": "assistant", "content": ""}, "", None) if self._chat else b""

    def piece(self, part: Part) -> bytes:
        """The chunks that bring a part: thought, text, and each call's piece."""
        chunks = [self._chunk({"reasoning_content": part.reasoning}, "", None)] if part.reasoning else []
        if part.text or part.tokens:
            logprobs = self._logprobs(part.tokens) if self._call.top_logprobs is not None else None
            if part.text or logprobs is not None:
                chunks.append(self._chunk({"content": part.text}, part.text, None, logprobs))
        chunks += [self._chunk({"tool_calls": [self._delta(delta)]}, "", None) for delta in part.calls]
        return b"".join(chunks)

    def closing(self, progress: Progress) -> bytes:
        """The chunk with the finish_reason, the usage chunk if it was asked for, and the end mark."""
        last = self._chunk({}, "", progress.finish_reason)
        if not self._call.include_usage:
            return last + DONE
        return last + event({**self._stream(), "choices": [], "usage": progress.usage()}) + DONE

    def _delta(self, delta: CallDelta) -> dict[str, Any]:
        if delta.name is None:
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        function = {"name": delta.name, "arguments": delta.arguments}
        return {"index": delta.index, "id": self._call_id(delta.index), "type": "function", "function": function}

    def _call_id(self, index: int) -> str:
        digits = hashlib.sha256(f"{self._token}/{index}".encode()).hexdigest()
        return digits[:9] if self._form is not None and self._form.short_ids else f"call_{digits[:24]}"

    def _stream(self) -> dict[str, Any]:
        return {**self._common, "object": "chat.completion.chunk" if self._chat else "text_completion"}

    def _chunk(self, delta: dict[str, Any], text: str, finish: str | None, logprobs: Any = None) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": logprobs}
        choice |= {"delta": delta} if self._chat else {"text": text}
        chunk = {**self._stream(), "choices": [choice]}
        if self._call.include_usage:
            chunk["usage"] = None
        return event(chunk)

    # ----------------------------------------------------------------------------------------------- logprobs

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        """Of the chosen tokens, and of as many alternatives as were asked for and the provider reports."""
        if self._chat:
            content = [
                {**_entry(token), "top_logprobs": [_entry(other) for other in token.alternatives]} for token in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [_top(token) for token in tokens] if self._call.top_logprobs else None,
            "text_offset": [token.offset for token in tokens],
        }


def _entry(token: TokenText | Alternative) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.data)}


def _top(token: TokenText) -> dict[str, float]:
    """The older endpoint's form: the likeliest by their text, and the chosen one whether it is among them or not."""
    likeliest = {other.text: _finite(other.logprob) for other in reversed(token.alternatives)}
    return {**likeliest, token.text: _finite(token.logprob)}


def _finite(logprob: float) -> float:
    """JSON has no minus infinity, by which half precision may state a very unlikely token; OpenAI writes -9999."""
    return logprob if math.isfinite(logprob) else -9999.0


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def model_entries(entries: Sequence[MarketEntry]) -> list[dict[str, Any]]:
    """/v1/models: each model once, with what its cheapest offer costs. `entries`: cheapest first."""
    offers: dict[str, list[MarketEntry]] = {}
    for entry in entries:
        offers.setdefault(entry.model, []).append(entry)
    return [
        {
            "id": model,
            "object": "model",
            "created": min(offer.tariff.valid_from for offer in found),
            "owned_by": "tallystick",
            "tally": {
                "providers": len(found),
                "max_context": max(offer.max_context for offer in found),
                "max_output": max(offer.max_output for offer in found),
                "prompt_wei": str(found[0].tariff.prompt_price),
                "cached_prompt_wei": str(found[0].tariff.cached_price),
                "completion_wei": str(found[0].tariff.completion_price),
                "reasoning_wei": str(found[0].tariff.reasoning_price),
                "embedding_wei": str(found[0].tariff.embedding_price),
                "per_request_wei": str(found[0].tariff.per_request),
                "tiers": [
                    tier.name.lower() for tier in Tier if any(tier_terms(offer.tariff, tier)[0] for offer in found)
                ],
                "verifiability": max(offer.verifiability for offer in found).name.lower(),
            },
        }
        for model, found in offers.items()
    ]
