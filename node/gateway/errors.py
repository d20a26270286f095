"""Every way the gateway says no, in the form and with the codes that OpenAI's clients understand.

The `type` matters as much as the status: several clients decide by it whether to try again. `x-should-retry: false`
goes out with every failure for which a provider has already been paid, because a retry would buy the same tokens twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from node.gateway.template import TemplateRefused
from node.gateway.vocabulary import CardUnusable
from node.ports import InsufficientFunds, JobFailed, NoProvider
from protocol.errors import Refused, TallyError, TierNotOffered
from protocol.frames import RefusalCode
from protocol.units import WEI_PER_TALLY, FinishReason

BUSY_RETRY_S: Final = 2
"""What 429 and 503 answers ask for as Retry-After. Unit: seconds. A slot frees within one short answer."""


class GatewayError(TallyError):
    """The gateway cannot start or keep its files; says which and what to do."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What a failed job had delivered, and paid for, before it failed. `cost`: wei."""

    jobs: tuple[str, ...] = ()
    provider: str | None = None
    cost: int = 0
    completion_tokens: int = 0
    text: str = ""

    @property
    def anything(self) -> bool:
        return self.cost > 0 or self.completion_tokens > 0


@dataclass
class ApiError(Exception):
    """An answer that is an error. `retry`: None leaves it to the client's own rule for the status."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    retry: bool | None = None
    retry_after_s: int | None = None
    delivered: Delivered | None = None

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"

    def body(self) -> dict[str, object]:
        error: dict[str, object] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.delivered is not None and self.delivered.anything:
            error["tally"] = {
                "jobs": list(self.delivered.jobs),
                "provider": self.delivered.provider,
                "cost_wei": str(self.delivered.cost),
                "completion_tokens": self.delivered.completion_tokens,
                "partial_text": self.delivered.text,
            }
        return {"error": error}

    def encoded(self) -> bytes:
        return msgspec.json.encode(self.body())

    def headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.retry is not None:
            headers["x-should-retry"] = "true" if self.retry else "false"
        return headers

    def for_delivered(self, delivered: Delivered) -> ApiError:
        """This error after something was delivered: it says so, and no client is to try again by itself."""
        if not delivered.anything:
            return self
        paid = in_tally(delivered.cost)
        said = f"{self.message} {delivered.completion_tokens} tokens had been delivered and cost {paid}."
        return ApiError(
            self.status, self.type, self.code, said, self.param, retry=False, retry_after_s=None, delivered=delivered
        )


def in_tally(wei: int) -> str:
    """`1500000000000000000` -> `1.5 TALLY`: the unit that `x_tally.max_price` is in. Exact."""
    whole, rest = divmod(wei, WEI_PER_TALLY)
    return f"{whole}.{rest:018d}".rstrip("0").rstrip(".") + " TALLY"


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """400: the request itself is wrong, at `param`."""
    return ApiError(400, "invalid_request_error", code, message, param)


def unsupported(param: str, message: str) -> ApiError:
    """400: a parameter that OpenAI knows and this network does not offer."""
    return invalid(param, f"{message} Nothing was sent or paid.", "unsupported_parameter")


def too_busy(message: str) -> ApiError:
    """429: try again shortly."""
    return ApiError(429, "rate_limit_error", "rate_limit_exceeded", message, retry_after_s=BUSY_RETRY_S)


def model_not_found(model: str, reason: str) -> ApiError:
    """404: nobody offers the model."""
    said = f"The model {model!r} is not on offer: {_sentence(reason)} Nothing was sent or paid."
    said = f"{said} GET /v1/models lists what is."
    return ApiError(404, "invalid_request_error", "model_not_found", said, "model")


def _sentence(said: str) -> str:
    return said if said.endswith((".", "!", "?")) else f"{said}."


def context_exceeded(prompt_tokens: int, max_context: int, param: str) -> ApiError:
    """400: the prompt leaves no room for an answer."""
    said = (
        f"This model's context is {max_context} tokens, and the prompt alone is {prompt_tokens}. "
        "Nothing was sent or paid. Shorten the prompt."
    )
    return invalid(param, said, "context_length_exceeded")


_REFUSALS: Final[dict[str, tuple[int, str, str]]] = {
    RefusalCode.BAD_REQUEST: (400, "invalid_request_error", "bad_request"),
    RefusalCode.CONTEXT_LENGTH: (400, "invalid_request_error", "context_length_exceeded"),
    RefusalCode.UNKNOWN_MODEL: (404, "invalid_request_error", "model_not_found"),
    RefusalCode.PAYMENT_REQUIRED: (402, "insufficient_quota", "insufficient_funds"),
    RefusalCode.TARIFF: (503, "server_error", "tariff_not_in_force"),
    RefusalCode.CEILING: (402, "insufficient_quota", "price_ceiling"),
    RefusalCode.BUSY: (429, "rate_limit_error", "provider_busy"),
    RefusalCode.DUPLICATE: (409, "invalid_request_error", "duplicate_job"),
    RefusalCode.DRAINING: (503, "server_error", "provider_draining"),
    RefusalCode.INTERNAL: (503, "server_error", "provider_failed"),
}
"""A refusal's code -> status, type and code. Codes of a later protocol version read as the provider's failure."""


def from_tally(exc: TallyError) -> ApiError:
    """The answer to an error of the marketplace or of a model card, before anything was delivered."""
    if isinstance(exc, Refused):
        status, kind, code = _REFUSALS.get(exc.code, (503, "server_error", "provider_refused"))
        said = f"The job was refused ({exc.code}): {_sentence(exc.reason)} Nothing was paid for it."
        after = BUSY_RETRY_S if status in (429, 503) else None
        return ApiError(status, kind, code, said, retry=False if status == 409 else None, retry_after_s=after)
    if isinstance(exc, InsufficientFunds):
        return ApiError(402, "insufficient_quota", "insufficient_funds", str(exc))
    if isinstance(exc, NoProvider):
        said = f"{_sentence(str(exc))} Nothing was paid for it."
        return ApiError(503, "server_error", "no_provider", said, retry_after_s=BUSY_RETRY_S)
    if isinstance(exc, JobFailed):
        return ApiError(503, "server_error", "job_failed", str(exc))
    if isinstance(exc, TierNotOffered):
        return invalid("service_tier", f"{exc}. Nothing was sent or paid.", "tier_not_offered")
    if isinstance(exc, TemplateRefused):
        return invalid("messages", str(exc), "chat_template_refused")
    if isinstance(exc, CardUnusable):
        return invalid("model", str(exc), "model_unusable")
    return ApiError(503, "server_error", "node_unavailable", str(exc), retry_after_s=BUSY_RETRY_S)


def from_finish(finish: FinishReason) -> ApiError:
    """The answer to a stream that ended for a reason that is no finish_reason of OpenAI's."""
    if finish is FinishReason.ESCROW_EXHAUSTED:
        said = "The escrow with this provider ran out while it was answering. Top the channel up and ask again."
        return ApiError(402, "insufficient_quota", "insufficient_funds", said, retry=False)
    if finish is FinishReason.DEADLINE:
        said = "The job's deadline passed before the answer was complete. Ask for fewer tokens or a faster tier."
        return ApiError(504, "server_error", "deadline_exceeded", said, retry=False)
    said = (
        f"The stream ended ({finish.name.lower()}) without the final receipt, so the answer is not complete. Ask again."
    )
    return ApiError(503, "server_error", "job_failed", said)


INTERNAL: Final = ApiError(
    500,
    "server_error",
    "internal_error",
    "The gateway itself failed; its log says where. Receipts and balances are safe in the node's journal.",
    retry=False,
)
