"""Who pays what when a stream ends: each row of the table as scenarios, in the order in which a cluster acts them."""

from __future__ import annotations

from tests.scenarios.vocabulary import (
    CLIENT,
    OTHER,
    POOR,
    PROMPT,
    PROVIDER,
    REFUND_BPS,
    TTFT_MS,
    Ask,
    Cancel,
    ChainDown,
    ChainUp,
    Crash,
    ExpectChain,
    ExpectError,
    ExpectEvidence,
    ExpectFinish,
    ExpectRunning,
    ExpectTokens,
    ExpectVouched,
    Freeze,
    Hold,
    Lie,
    MustPay,
    Purse,
    Release,
    Restart,
    Scenario,
    Thaw,
    Work,
)

END = "END, accepted"
CANCELS = "client cancels or vanishes"
DIES = "provider dies or stalls"
LIES = "receipt does not recompute"
LATE = "deadline or TTFT promise missed"
BAD = "over-length or bad request"
DRY = "escrow exhausted"
AWAY = "the chain's RPC is down"

CONTINUED = Work(tokens=120 - 32, prompt=len(PROMPT) + 32)
"""What a successor does for a job of 120 tokens of which 32 were acknowledged: their prefill, and the rest."""

SCENARIOS = (
    Scenario("end", END, (Ask(70), ExpectFinish(70), MustPay(PROVIDER, (Work(70),)))),
    Scenario(
        "eight_at_once",
        END,
        (
            *(Ask(33 + i, job=f"job{i}") for i in range(8)),
            *(ExpectFinish(33 + i, job=f"job{i}") for i in range(8)),
            MustPay(PROVIDER, tuple(Work(33 + i) for i in range(8))),
        ),
    ),
    Scenario(
        "client_cancels",
        CANCELS,
        (
            Hold(40),
            Ask(500),
            ExpectTokens(33),
            Cancel(),
            MustPay(PROVIDER, (Work(33, tokens_at_most=40),)),
            Release(),
        ),
    ),
    Scenario(
        "client_vanishes",
        CANCELS,
        (
            Hold(50),
            Ask(500),
            ExpectVouched(32),
            Crash(CLIENT),
            MustPay(PROVIDER, (Work(32),)),
            Release(),
            Restart(CLIENT),
            Ask(40, job="next"),
            ExpectFinish(40, job="next"),
            MustPay(PROVIDER, (Work(32), Work(40))),
        ),
    ),
    Scenario(
        "provider_dies",
        DIES,
        (
            Hold(50),
            Ask(120),
            ExpectVouched(32),
            Crash(PROVIDER),
            ExpectFinish(120),
            MustPay(OTHER, (CONTINUED,)),
            Release(),
            Restart(PROVIDER),
            MustPay(PROVIDER, (Work(32),)),
            Ask(40, job="next"),
            ExpectFinish(40, job="next"),
            MustPay(PROVIDER, (Work(32), Work(40))),
        ),
    ),
    Scenario(
        "provider_stalls",
        DIES,
        (
            Hold(50),
            Ask(120),
            ExpectVouched(32),
            Freeze(PROVIDER),
            ExpectFinish(120),
            MustPay(OTHER, (CONTINUED,)),
            Release(),
            Thaw(PROVIDER),
            MustPay(PROVIDER, (Work(32),)),
        ),
    ),
    Scenario(
        "everybody_stalls",
        DIES,
        (
            Hold(40),
            Hold(5, who=OTHER),
            Ask(200),
            ExpectError("job_failed", after=32),
            MustPay(PROVIDER, (Work(32),)),
            MustPay(OTHER, ()),
            Release(),
            Release(OTHER),
        ),
    ),
    Scenario(
        "receipt_false",
        LIES,
        (
            Lie(2),
            Ask(120),
            ExpectFinish(120),
            ExpectEvidence(),
            MustPay(PROVIDER, (Work(32),)),
            MustPay(OTHER, (CONTINUED,)),
            Lie(0),
        ),
    ),
    Scenario(
        "every_receipt_false",
        LIES,
        (
            Lie(2),
            Lie(1, who=OTHER),
            Ask(120),
            ExpectError("job_failed", after=32),
            MustPay(PROVIDER, (Work(32),)),
            MustPay(OTHER, ()),
            Lie(0),
            Lie(0, who=OTHER),
        ),
    ),
    Scenario(
        "first_token_late",
        LATE,
        (
            Hold(0),
            Ask(40, tier="priority"),
            ExpectRunning(for_s=TTFT_MS / 1000 + 0.1),
            Release(),
            ExpectFinish(40, refunded=True),
            MustPay(PROVIDER, (Work(40, refund_bps=REFUND_BPS),)),
        ),
    ),
    Scenario(
        "deadline_missed",
        LATE,
        (
            Hold(40),
            Ask(200, tier="priority", deadline_s=1.5),
            ExpectError("deadline_exceeded", after=40),
            # More was vouched for than is owed after the refund: the channel holds it to the client's credit.
            MustPay(PROVIDER, (Work(32),)),
            Release(),
            Ask(12, job="next"),
            ExpectFinish(12, job="next"),
            MustPay(PROVIDER, (Work(40, refund_bps=REFUND_BPS), Work(12))),
        ),
    ),
    Scenario(
        "too_long",
        BAD,
        (Ask(10, prompt=PROMPT * 1100), ExpectError("context_length_exceeded"), MustPay(PROVIDER, ())),
    ),
    Scenario(
        "escrow_exhausted",
        DRY,
        (
            Purse(80),
            Ask(500, by=POOR),
            ExpectError("insufficient_funds", after=64),
            MustPay(PROVIDER, (Work(64),), by=POOR),
            Ask(100, by=POOR, job="next"),
            ExpectError("insufficient_funds", job="next"),
            MustPay(PROVIDER, (Work(64),), by=POOR),
        ),
    ),
    Scenario(
        "rpc_down",
        AWAY,
        (
            Ask(64, job="before"),
            ExpectFinish(64, job="before"),
            MustPay(PROVIDER, (Work(64),)),
            ChainDown(),
            ExpectChain(PROVIDER, reachable=False),
            ExpectChain(CLIENT, reachable=False),
            Ask(40),
            ExpectFinish(40),
            ChainUp(),
            ExpectChain(PROVIDER, reachable=True),
            MustPay(PROVIDER, (Work(64), Work(40))),
        ),
    ),
)
