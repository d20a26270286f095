"""The work account of one job: tokens in, receipts out. Provider and client run the same code over the same tokens.

The provider builds each receipt from its account; the client builds the one it expects from its own account and
compares every field, so a receipt is recomputed, never believed. Only the provider's clock and the number of cached
tokens come from outside, and the client bounds both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Final

from protocol.cache import BLOCK_TOKENS, cache_head, hit_limit, prompt_head
from protocol.eip712 import Domain, digest
from protocol.errors import ReceiptMismatch, RemoteProtocolError
from protocol.messages import Accept, JobRequest, Profile, Tariff, WorkReceipt
from protocol.metering import Reasoning, Usage, job_ste_micro
from protocol.options import JobOptions
from protocol.tariff import Cost, Timing, basis_of, cost_up, worst_case_up
from protocol.transcript import ROUTING_BYTES, Leaf, Row, Transcript
from protocol.units import LEAF_TOKENS, ZERO_DIGEST, Digest, FinishReason, JobId, JobKind, Wei

CLOCK_SLACK_MS: Final = 5_000
"""How far the provider's clock may be from ours before its receipt times are refused. Unit: ms. Wide enough for
ordinary NTP drift and a busy client; doubling it lets a provider hide a TTFT promise missed by as much."""


DURATION_SLACK_MS: Final = 1_000
"""How much shorter a stated duration may be than the client measured it. Unit: ms; for voucher waits per receipt.
Covers the network and a busy client; doubling it lets a provider hide that much more of a missed promise."""


@dataclass(frozen=True, slots=True)
class Work:
    """One job so far. `pending`: tokens not yet in a leaf.

    `heads`: block heads of the prompt under the payer's cache salt, () where it named none. `kept`: the provider holds
    all of them now. `step`: receipts made. `previous`: digest of the last one. `total`: what it comes to, wei.
    `waited_ms`: time the provider waited for vouchers (a client: how long it let them wait). `accepted_seen`,
    `first_seen`: a client's own clock at the acceptance and at the first token, Unix ms; 0 at the provider, whose clock
    the receipts carry.
    """

    job_id: JobId
    request: JobRequest
    options: JobOptions
    tariff: Tariff
    profile: Profile
    transcript: Transcript
    reasoning: Reasoning
    received_at: int
    heads: tuple[Digest, ...] = ()
    cached_tokens: int = 0
    kept: bool = False
    first_token_at: int = 0
    pending: tuple[Row, ...] = ()
    step: int = 0
    previous: Digest = ZERO_DIGEST
    total: Wei = field(default=Wei(0))
    waited_ms: int = 0
    accepted_seen: int = 0
    first_seen: int = 0

    @classmethod
    def start(
        cls,
        job_id: JobId,
        request: JobRequest,
        options: JobOptions,
        tariff: Tariff,
        profile: Profile,
        accept: Accept,
        heads: tuple[Digest, ...],
        seen_at: int = 0,
    ) -> Work:
        """The account at acceptance, before any token. `seen_at`: when a client got the acceptance, its Unix ms.

        `heads`: block heads of the prompt, () where the client named no cache. An embedding job has none: it is
        priced by texts, and a head in its receipt would read as a prompt that had to be looked up.
        """
        return cls(
            job_id,
            request,
            options,
            tariff,
            profile,
            Transcript.start(job_id),
            Reasoning(profile.reasoning_start, profile.reasoning_end, options.reasoning_open),
            accept.accepted_at,
            heads=() if request.kind == JobKind.EMBED else heads,
            accepted_seen=seen_at,
        )

    @property
    def embeds(self) -> bool:
        """Whether the job's output is vectors."""
        return self.request.kind == JobKind.EMBED

    @property
    def completion_tokens(self) -> int:
        """Tokens taken in so far, pending ones included."""
        return self.transcript.tokens + len(self.pending)

    @property
    def begun(self) -> bool:
        """Whether any output has come."""
        return bool(self.completion_tokens or (self.embeds and self.transcript.leaves))

    @property
    def room(self) -> int:
        """Tokens until the leaf is full and a receipt is due; never more than max_tokens leaves, and none in an
        embedding job."""
        if self.embeds:
            return 0
        return min(LEAF_TOKENS - len(self.pending), self.request.max_tokens - self.completion_tokens)

    def hit(self, cached_tokens: int, *, kept: bool) -> Work:
        """With what the prefix cache held of the prompt, and whether it holds all of it now."""
        return replace(self, cached_tokens=cached_tokens, kept=kept and len(self.heads) > 1)

    def take(self, rows: tuple[Row, ...], now_ms: int) -> Work:
        """With more tokens.

        Raises: RemoteProtocolError when they overrun the leaf or max_tokens, or lack the routing their profile has.
        """
        if not 0 < len(rows) <= self.room:
            raise RemoteProtocolError(f"{len(rows)} tokens where at most {self.room} may come before the next receipt")
        width = ROUTING_BYTES if self.profile.moe_layers else 0
        if any(len(row.routing) != width for row in rows):
            raise RemoteProtocolError(f"each token of this profile carries {width} bytes of routing evidence")
        first, seen = self.first_token_at or now_ms, self.first_seen or now_ms
        reasoning = self.reasoning.take(row.token_id for row in rows)
        return replace(self, pending=self.pending + rows, first_token_at=first, first_seen=seen, reasoning=reasoning)

    def take_vector(self, index: int, vector: bytes, now_ms: int) -> Work:
        """With one more embedding. Raises: RemoteProtocolError when it is not the one that comes next."""
        if not self.embeds or index != self.transcript.leaves or index >= len(self.options.inputs):
            raise RemoteProtocolError(
                f"vector {index} where {self.transcript.leaves} of {len(self.options.inputs)} came"
            )
        first, seen = self.first_token_at or now_ms, self.first_seen or now_ms
        return replace(self, transcript=self.transcript.extend_vector(vector), first_token_at=first, first_seen=seen)

    def waited(self, milliseconds: int) -> Work:
        """With that much more time spent between a receipt and its voucher."""
        return replace(self, waited_ms=self.waited_ms + max(0, milliseconds))

    @property
    def _read(self) -> tuple[int, ...]:
        """Lengths of the texts whose vectors were delivered: what an embedding job is charged for."""
        return self.options.inputs[: self.transcript.leaves]

    def usage(self) -> Usage:
        """Counts so far."""
        if self.embeds:
            return Usage(sum(self._read), 0, 0, 0)
        return Usage(self.request.prompt_tokens, self.cached_tokens, self.completion_tokens, self.reasoning.tokens)

    def ste_micro(self) -> int:
        """Work so far, in millionths of a standard token equivalent."""
        return job_ste_micro(self.profile, self.usage(), self._read if self.embeds else None)

    def timing(self, finished_at: int = 0) -> Timing:
        """Times so far; `finished_at` only for the final receipt."""
        return Timing(self.received_at, self.first_token_at, finished_at, self.waited_ms)

    def cost(self, finished_at: int) -> Cost:
        """Cost of everything so far."""
        return cost_up(self.tariff, self.usage(), basis_of(self.request), self.timing(finished_at))

    def receipt(self, finish: FinishReason, finished_at: int, vouched: Wei) -> tuple[Work, WorkReceipt]:
        """Close the leaf and state what is owed so far. `finish` OPEN makes an interim receipt.

        `finished_at`: Unix ms for a final receipt, 0 for an interim one. `vouched`: highest voucher held, wei.
        Raises: RemoteProtocolError when an interim receipt comes before the leaf is full.
        """
        final = finish is not FinishReason.OPEN
        if not final and len(self.pending) != LEAF_TOKENS:
            raise RemoteProtocolError(f"an interim receipt covers {LEAF_TOKENS} tokens, not {len(self.pending)}")
        cost = self.cost(finished_at)
        usage = self.usage()
        request = self.request
        transcript = self.transcript.extend(Leaf.of(self.pending)) if self.pending else self.transcript
        receipt = WorkReceipt(
            provider=request.provider,
            client=request.client,
            job_id=Digest(self.job_id),
            kind=request.kind,
            tier=request.tier,
            is_private=request.is_private,
            base_bps=request.base_bps,
            reservation=request.reservation,
            step=self.step + 1,
            is_final=final,
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
            reasoning_tokens=usage.reasoning,
            cache_head=cache_head(self.heads, usage.cached),
            prompt_head=prompt_head(self.heads),
            is_kept=self.kept,
            ste_micro=self.ste_micro(),
            leaves_root=transcript.head,
            routing_root=transcript.routing,
            finish_reason=finish,
            received_at=self.received_at,
            first_token_at=self.first_token_at,
            finished_at=finished_at,
            waited_ms=self.waited_ms,
            prompt_line=cost.prompt_line,
            cached_line=cost.cached_line,
            completion_line=cost.completion_line,
            reasoning_line=cost.reasoning_line,
            multiplier=cost.multiplier,
            per_request=cost.per_request,
            refund=cost.refund,
            total=cost.total,
            vouched=vouched,
            tariff_hash=request.tariff_hash,
            previous=self.previous,
        )
        return replace(self, transcript=transcript, pending=(), step=self.step + 1, total=cost.total), receipt

    def sealed(self, receipt_digest: Digest) -> Work:
        """With the digest of the receipt just made, which the next one names as its previous."""
        return replace(self, previous=receipt_digest)


def derive_expected(work: Work, claimed: WorkReceipt, now_ms: int) -> tuple[Work, WorkReceipt]:
    """The receipt our own account gives for the moment the peer's claims, taking only its clock from it.

    Raises: ReceiptMismatch when the times or cached count cannot be, RemoteProtocolError when no receipt is due.
    """
    try:
        finish = FinishReason(claimed.finish_reason)
    except ValueError as exc:
        raise ReceiptMismatch("finish_reason", claimed.finish_reason, "a known reason") from exc
    if claimed.is_final != (finish is not FinishReason.OPEN):
        raise ReceiptMismatch("is_final", claimed.is_final, finish is not FinishReason.OPEN)
    _check_cache(work, claimed)
    _check_times(work, claimed, now_ms)
    _check_durations(work, claimed, now_ms)
    _check_finish(work, finish, claimed, now_ms)
    ours = replace(
        work,
        first_token_at=claimed.first_token_at,
        cached_tokens=claimed.cached_tokens,
        kept=claimed.is_kept,
        waited_ms=claimed.waited_ms,
    )
    return ours.receipt(finish, claimed.finished_at, Wei(claimed.vouched))


def _check_cache(work: Work, claimed: WorkReceipt) -> None:
    """A hit is whole blocks of a prompt whose payer wanted caching, with the head that our own hashing gives."""
    # SPEC 5.7: Cached tokens are whole blocks of 32, at least one token of the prompt is computed
    limit = hit_limit(work.request.prompt_tokens) if work.heads else 0
    if claimed.cached_tokens > limit or claimed.cached_tokens % BLOCK_TOKENS:
        raise ReceiptMismatch("cached_tokens", claimed.cached_tokens, f"whole blocks, at most {limit}")
    if work.step and claimed.cached_tokens != work.cached_tokens:  # said once, lest a hit be priced as a miss later
        raise ReceiptMismatch("cached_tokens", claimed.cached_tokens, work.cached_tokens)
    if work.step and claimed.is_kept != work.kept:
        raise ReceiptMismatch("is_kept", claimed.is_kept, work.kept)
    if claimed.is_kept and prompt_head(work.heads) == ZERO_DIGEST:
        raise ReceiptMismatch("is_kept", True, False)


def _check_times(work: Work, claimed: WorkReceipt, now_ms: int) -> None:
    """The provider's clock, held against ours: in order, said once, and no further off than CLOCK_SLACK_MS.

    Too early a first token hides that it was late; too late a one hides that those after it were slow.
    """
    # SPEC 4.4: the first token's time and the cached count the same in every receipt
    observed = work.first_token_at
    if work.step and claimed.first_token_at != observed:
        raise ReceiptMismatch("first_token_at", claimed.first_token_at, observed)
    if bool(claimed.first_token_at) != work.begun:
        raise ReceiptMismatch("first_token_at", claimed.first_token_at, observed)
    if claimed.first_token_at and not (
        work.received_at <= claimed.first_token_at and abs(observed - claimed.first_token_at) <= CLOCK_SLACK_MS
    ):
        raise ReceiptMismatch("first_token_at", claimed.first_token_at, observed)
    if claimed.is_final != bool(claimed.finished_at):
        raise ReceiptMismatch("finished_at", claimed.finished_at, now_ms)
    if claimed.is_final and not (
        max(work.received_at, claimed.first_token_at) <= claimed.finished_at
        and abs(now_ms - claimed.finished_at) <= CLOCK_SLACK_MS
    ):
        raise ReceiptMismatch("finished_at", claimed.finished_at, now_ms)


def _check_durations(work: Work, claimed: WorkReceipt, now_ms: int) -> None:
    """Promises are about durations, which two clocks measure alike however far apart they stand.

    A provider that states a shorter wait than we saw hides a promise it missed.
    """
    # SPEC 4.4: durations no more than 1 s shorter than the client measured
    if work.accepted_seen and claimed.first_token_at:
        seen = work.first_seen - work.accepted_seen
        if claimed.first_token_at - work.received_at < seen - DURATION_SLACK_MS:
            raise ReceiptMismatch("first_token_at", claimed.first_token_at - work.received_at, seen)
    if work.accepted_seen and claimed.finished_at and work.first_seen:
        seen = now_ms - work.first_seen
        if claimed.finished_at - claimed.first_token_at < seen - DURATION_SLACK_MS:
            raise ReceiptMismatch("finished_at", claimed.finished_at - claimed.first_token_at, seen)
    if work.accepted_seen and claimed.waited_ms > work.waited_ms + DURATION_SLACK_MS * (work.step + 1):
        raise ReceiptMismatch("waited_ms", claimed.waited_ms, work.waited_ms)


def _check_finish(work: Work, finish: FinishReason, claimed: WorkReceipt, now_ms: int) -> None:
    """A reason to stop that the tokens themselves contradict. STOP is checked by the caller, who knows the ids."""
    if finish is FinishReason.OPEN and work.completion_tokens >= work.request.max_tokens:
        raise ReceiptMismatch("finish_reason", "open", "all the tokens that were asked for")
    if finish is FinishReason.ERROR:
        raise ReceiptMismatch("finish_reason", "error", "a reason the client pays for")
    if work.embeds:
        done = work.transcript.leaves == len(work.options.inputs)
        if finish is FinishReason.LENGTH or done != (finish is FinishReason.STOP):
            raise ReceiptMismatch("finish_reason", finish.name.lower(), f"{work.transcript.leaves} vectors")
    elif finish is FinishReason.LENGTH and work.completion_tokens != work.request.max_tokens:
        raise ReceiptMismatch(
            "finish_reason", "length", f"{work.completion_tokens} of {work.request.max_tokens} tokens"
        )
    early = claimed.finished_at < work.request.deadline and now_ms + CLOCK_SLACK_MS < work.request.deadline
    if finish is FinishReason.DEADLINE and early:
        raise ReceiptMismatch("finish_reason", "deadline", f"{work.request.deadline - now_ms} ms were left")


def check_receipt(domain: Domain, work: Work, claimed: WorkReceipt, now_ms: int) -> tuple[Work, Digest]:
    """Recompute `claimed` from our account; returns the account after it and the receipt's digest.

    `now_ms`: our clock. Raises: ReceiptMismatch naming the first field that differs, RemoteProtocolError.
    """
    # SPEC 4.4: The client recomputes every field of a receipt from its own account of the stream
    after, expected = derive_expected(work, claimed, now_ms)
    for item in fields(WorkReceipt):
        if getattr(claimed, item.name) != getattr(expected, item.name):
            raise ReceiptMismatch(item.name, getattr(claimed, item.name), getattr(expected, item.name))
    receipt_digest = digest(domain, claimed)
    return replace(after, waited_ms=work.waited_ms).sealed(receipt_digest), receipt_digest


def most_up(tariff: Tariff, request: JobRequest, tokens: int) -> Wei:
    """The most that `request` can come to with `tokens` output tokens, or as many as it asks for if that is fewer."""
    return worst_case_up(tariff, request.prompt_tokens, min(tokens, request.max_tokens), basis_of(request))


def nonce_commitment(provider_nonce: bytes) -> Digest:
    """What a quote carries: SHA-256 of the nonce that Accept opens."""
    return Digest(hashlib.sha256(provider_nonce).digest())
