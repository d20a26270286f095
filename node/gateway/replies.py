"""The JSON that OpenAI's clients expect back: whole answers, stream chunks, usage.

Every chunk of a stream carries the same id, object, created and model; exactly one carries a finish_reason. What only
a marketplace knows (job, provider, cost, receipts) stands in `usage.tally` and in x-tally-* headers, where clients that
do not know it pass it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from node.gateway.detokenise import Piece, TokenText
from node.gateway.errors import Delivered
from node.gateway.requests import Call, Kind
from node.ports import JobDone, MarketEntry, ModelCard

DONE: Final = b"data: [DONE]\n\n"
KEEPALIVE: Final = b": keep-alive\n\n"
"""A comment: readers of event streams skip it, and proxies see that the connection lives."""


@dataclass(slots=True)
class Progress:
    """What is known of a running job. `cost`: wei vouched for. `tokens`: delivered. `done`: once it was receipted."""

    prompt_tokens: int
    jobs: list[str] = field(default_factory=list)
    provider: str | None = None
    cost: int = 0
    tokens: int = 0
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    done: JobDone | None = None

    def delivered(self) -> Delivered:
        return Delivered(tuple(self.jobs), self.provider, self.cost, self.tokens, "".join(self.text))

    def headers(self) -> dict[str, str]:
        """Who serves this, as far as is known when the headers go out."""
        headers = {"x-tally-job": ",".join(self.jobs), "x-tally-provider": self.provider or ""}
        return {name: value for name, value in headers.items() if value}

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage, from the final receipt where there is one.

        `tally.final` is false when a stop string ended the stream on this side: then the counts are of what arrived,
        and the closing voucher may add at most one increment of 32 tokens to the cost.
        """
        done = self.done
        prompt = done.prompt_tokens if done else self.prompt_tokens
        completion = done.completion_tokens if done else self.tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens if done else 0},
            "completion_tokens_details": {"reasoning_tokens": done.reasoning_tokens if done else 0},
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
    """One answer's shape, for either endpoint. `token`: the random part of its id. `created`: Unix seconds."""

    def __init__(self, call: Call, card: ModelCard, *, token: str, created: int) -> None:
        self._call = call
        self._chat = call.kind is Kind.CHAT
        self.id = f"{call.kind.value}-{token}"
        self._common: dict[str, Any] = {
            "id": self.id,
            "created": created,
            "model": call.model,
            "system_fingerprint": "fp_" + card.profile_id.hex()[:16],
            "service_tier": call.service_tier,
        }

    # -------------------------------------------------------------------------------------------------- whole

    def whole(self, text: str, tokens: Sequence[TokenText], progress: Progress) -> bytes:
        """The answer to a request that asked for no stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": progress.finish_reason, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        if self._call.top_logprobs is not None:
            choice["logprobs"] = self._logprobs(tokens)
        kind = "chat.completion" if self._chat else "text_completion"
        return msgspec.json.encode(
            {**self._common, "object": kind, "choices": [choice], "usage": progress.usage()},
        )

    # ------------------------------------------------------------------------------------------------- stream

    def opening(self) -> bytes:
        """The first chunk of a chat: whose turn it is. A text completion has none."""
        return self._chunk({"role": "assistant", "content": ""}, "", None) if self._chat else b""

    def piece(self, piece: Piece) -> bytes:
        """A chunk of text."""
        logprobs = self._logprobs(piece.tokens) if self._call.top_logprobs is not None else None
        return self._chunk({"content": piece.text}, piece.text, None, logprobs)

    def closing(self, progress: Progress) -> bytes:
        """The chunk with the finish_reason, the usage chunk if it was asked for, and the end mark."""
        last = self._chunk({}, "", progress.finish_reason)
        if not self._call.include_usage:
            return last + DONE
        return last + event({**self._stream(), "choices": [], "usage": progress.usage()}) + DONE

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
        """Of the chosen tokens: the receipt covers these and no others, so alternatives cannot be listed."""
        listed = (self._call.top_logprobs or 0) > 0
        if self._chat:
            entries = [{"token": token.text, "logprob": token.logprob, "bytes": list(token.data)} for token in tokens]
            content = [{**entry, "top_logprobs": [entry] if listed else []} for entry in entries]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{token.text: token.logprob} for token in tokens] if listed else None,
            "text_offset": [token.offset for token in tokens],
        }


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
                "per_request_wei": str(found[0].tariff.per_request),
            },
        }
        for model, found in offers.items()
    ]
