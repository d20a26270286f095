"""A job as both sides account for it: drawn by Hypothesis, then played receipt by receipt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from hypothesis import strategies as st

from protocol.cache import BLOCK_TOKENS, block_heads, hit_limit
from protocol.eip712 import Domain, digest
from protocol.messages import Accept, JobRequest, Profile, Tariff, WorkReceipt
from protocol.options import NO_OPTIONS, JobOptions, encode_options, options_hash
from protocol.transcript import Row
from protocol.units import ZERO_DIGEST, Address, Digest, FinishReason, JobId, JobKind, Tier, Wei
from protocol.work import Work, check_receipt
from tests.protocol.sheets import PROFILE, SHEET, bases, tariffs

DOMAIN: Final = Domain(31337, Address(b"\x11" * 20))
START: Final = 1_750_000_000_000
DEADLINE: Final = START + 10_000_000
SALT: Final = b"\x24" * 32

REQUEST: Final = JobRequest(
    provider=Address(b"\x21" * 20),
    client=Address(b"\x22" * 20),
    profile_id=ZERO_DIGEST,
    kind=JobKind.GENERATE,
    prompt_hash=ZERO_DIGEST,
    prompt_tokens=100,
    max_tokens=100,
    temperature_micro=1_000_000,
    top_p_micro=1_000_000,
    top_k=0,
    options_hash=options_hash(encode_options(NO_OPTIONS)),
    tier=Tier.STANDARD,
    is_private=False,
    tariff_hash=Digest(b"\x23" * 32),
    base_bps=10_000,
    reservation=ZERO_DIGEST,
    price_ceiling=(1 << 96) - 1,
    client_nonce=ZERO_DIGEST,
    provider_commitment=ZERO_DIGEST,
    client_box_key=ZERO_DIGEST,
    deadline=DEADLINE,
    parent_job=ZERO_DIGEST,
    parent_seed=ZERO_DIGEST,
)


@dataclass(frozen=True)
class Job:
    """`frames`: tokens per frame and ms since the last. `lag_ms`: how much later the client hears. `vouched`: wei.

    `wait_ms`: how long each voucher lets the provider wait. `salted`: the payer named a cache; its prompt is 0, 1, ...
    """

    request: JobRequest
    tariff: Tariff
    cached: int
    frames: tuple[tuple[tuple[Row, ...], int], ...]
    finish: FinishReason
    lag_ms: int
    vouched: Wei
    wait_ms: int = 0
    kept: bool = False
    profile: Profile = PROFILE
    options: JobOptions = NO_OPTIONS
    salted: bool = True

    def accept(self) -> Accept:
        """How the provider took it."""
        return Accept(Digest(digest(DOMAIN, self.request)), ZERO_DIGEST, ZERO_DIGEST, START)

    def begin(self, seen_at: int = 0) -> Work:
        """Either side's account at acceptance; `seen_at` of a client."""
        accept = self.accept()
        heads = block_heads(SALT, range(self.request.prompt_tokens)) if self.salted else ()
        job_id = JobId(accept.job_id)
        return Work.start(job_id, self.request, self.options, self.tariff, self.profile, accept, heads, seen_at)


@dataclass(frozen=True)
class Stage:
    """One receipt: the client's account when it arrives, the provider's after it, and the client's clock."""

    client: Work
    receipt: WorkReceipt
    provider: Work
    now_ms: int


def play(job: Job) -> Iterator[Stage]:
    """Every receipt the provider makes; send back the client's account after it. The last is final."""
    provider, client = job.begin(), job.begin(START + job.lag_ms)
    now = START
    for rows, pause in job.frames:
        now += pause
        while rows and provider.room:
            if not provider.completion_tokens:
                provider = provider.hit(job.cached, kept=job.kept)
            part, rows = rows[: provider.room], rows[provider.room :]
            provider, client = provider.take(part, now), client.take(part, now + job.lag_ms)
            if len(provider.pending) == 32 and provider.completion_tokens < job.request.max_tokens:
                provider, receipt = provider.receipt(FinishReason.OPEN, 0, job.vouched)
                provider = provider.sealed(digest(DOMAIN, receipt))
                client = yield Stage(client, receipt, provider, now + job.lag_ms)
                now += job.wait_ms
                provider, client = provider.waited(job.wait_ms), client.waited(job.wait_ms)
    finish = job.finish
    if provider.completion_tokens == job.request.max_tokens:
        finish = FinishReason.LENGTH
    elif finish is FinishReason.DEADLINE:
        now = DEADLINE
    provider, receipt = provider.receipt(finish, now, job.vouched)
    yield Stage(client, receipt, provider.sealed(digest(DOMAIN, receipt)), now + job.lag_ms)


def stages(job: Job) -> list[Stage]:
    """Every receipt of a job that an honest client follows."""
    game, out = play(job), []
    stage: Stage | None = next(game)
    while stage is not None:
        out.append(stage)
        after, _ = check_receipt(DOMAIN, stage.client, stage.receipt, stage.now_ms)
        try:
            stage = game.send(after)
        except StopIteration:
            stage = None
    return out


def row(number: int, routing: bytes = b"") -> Row:
    """Some token."""
    return Row(number, b"\x3c\x00", bytes([number % 256]) * 16, routing)


LONG: Final = Job(
    replace(REQUEST, max_tokens=90),
    SHEET,
    cached=32,
    frames=tuple((tuple(row(first + i) for i in range(20)), 400) for first in (0, 20, 40, 60)),
    finish=FinishReason.STOP,
    lag_ms=30,
    vouched=Wei(5_000),
    wait_ms=200,
)
"""80 of 90 tokens: interim receipts at 32 and 64, a final one over 16 more."""

EXPERTS: Final = replace(PROFILE, total_parameters=47_000_000_000, moe_layers=32, experts=8, experts_chosen=2)
"""A mixture of experts, whose tokens carry 8 bytes of routing evidence."""

rows = st.builds(
    Row,
    st.integers(0, (1 << 32) - 1),
    st.binary(min_size=2, max_size=2),
    st.binary(min_size=16, max_size=16),
    st.just(b""),
)
NOT_CHOSEN: Final = (FinishReason.OPEN, FinishReason.LENGTH, FinishReason.ERROR)
"""Reasons a provider does not choose to end by: still running, follows from the count, and nobody pays for it."""

endings = st.sampled_from([reason for reason in FinishReason if reason not in NOT_CHOSEN])


@st.composite
def jobs(draw: st.DrawFn, sheets: st.SearchStrategy[Tariff] | None = None) -> Job:
    """Jobs of up to 100 output tokens in frames of any size, over any admitted tariff.

    Of dense models and experts, with and without a cache, and with reasoning blocks that open and close anywhere.
    """
    prompt = draw(st.integers(1, 5_000))
    tariff = draw(tariffs() if sheets is None else sheets)
    basis = draw(bases(tariff).filter(lambda basis: basis.kind is not JobKind.EMBED))
    request = replace(
        REQUEST,
        kind=basis.kind,
        prompt_tokens=prompt,
        max_tokens=draw(st.integers(1, 100)),
        tier=basis.tier,
        is_private=basis.private,
        base_bps=basis.base_bps,
        reservation=basis.reservation,
        client_nonce=Digest(draw(st.binary(min_size=32, max_size=32))),
    )
    token = draw(rows)
    profile, salted = draw(st.sampled_from([PROFILE, EXPERTS])), draw(st.booleans())
    if profile.moe_layers:
        token = token._replace(routing=draw(st.binary(min_size=8, max_size=8)))
    if draw(st.booleans()):
        opened, closed = (draw(st.integers(0, 120)) for _ in range(2))
        markers = {
            "reasoning_start": (token.token_id + opened) % 2**32,
            "reasoning_end": (token.token_id + closed) % 2**32,
        }
        profile = replace(profile, **markers)
    options = JobOptions(reasoning_open=draw(st.booleans()))
    request = replace(request, options_hash=options_hash(encode_options(options)))
    frames = []
    for size, pause in draw(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3_000)), max_size=5)):
        frames.append((tuple(token._replace(token_id=(token.token_id + i) % 2**32) for i in range(size)), pause))
    return Job(
        request=request,
        tariff=tariff,
        cached=draw(st.integers(0, hit_limit(prompt) // BLOCK_TOKENS)) * BLOCK_TOKENS if salted else 0,
        frames=tuple(frames),
        finish=draw(endings),
        lag_ms=draw(st.integers(0, 2_000)),
        vouched=Wei(draw(st.integers(0, 1 << 95))),
        wait_ms=draw(st.integers(0, 5_000)),
        kept=draw(st.booleans()),
        profile=profile,
        options=options,
        salted=salted,
    )


NO_REFUNDS: Final = tariffs().map(
    lambda sheet: replace(sheet, flex_refund_bps=0, standard_refund_bps=0, priority_refund_bps=0)
)
