"""What a scenario is made of: players and steps, as plain data that any stage can act out.

A stage (`twins.TwinStage`, `processes.ProcessStage`) has one method per step. Players are known by name: `provider`
(the cheap one), `other` (dearer, so that it is chosen only when `provider` is not), `client`, and `poor`, whose
wallet holds a `Purse` and nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

PROVIDER, OTHER, CLIENT, POOR = "provider", "other", "client", "poor"

PROMPT_PRICE = 10**10
TOKEN_PRICE = 10**11
"""Wei per token of `provider`, in every stage."""

DEARER = 20
"""Price factor of `other`. Above the worst standing a provider can get by failing, so that order is certain."""

PROMPT = (5, 6, 7, 8)

REFUND_BPS = 5_000
"""Share given back when a promise is missed, by every provider; only the tier `priority` promises anything."""

TTFT_MS, TPOT_MS = 1_000, 20
"""What `priority` promises: ms to the first token, and ms a token on average."""


@dataclass(frozen=True, slots=True)
class Hold:
    """`who`'s engine stops before its output token `at`, in every job, until `Release`."""

    at: int
    who: str = PROVIDER


@dataclass(frozen=True, slots=True)
class Release:
    who: str = PROVIDER


@dataclass(frozen=True, slots=True)
class Lie:
    """`who` adds one wei to each receipt from `step` on; 0: it is honest again."""

    step: int
    who: str = PROVIDER


@dataclass(frozen=True, slots=True)
class Ask:
    """`by` asks for `tokens`; the job is spoken of as `job` from here on."""

    tokens: int
    job: str = "job"
    by: str = CLIENT
    prompt: tuple[int, ...] = PROMPT
    tier: str = "default"
    deadline_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ExpectTokens:
    """The reader of `job` has got that many."""

    at_least: int
    job: str = "job"


@dataclass(frozen=True, slots=True)
class ExpectRunning:
    """`who` has a job under way, and has had it for that many seconds."""

    who: str = PROVIDER
    for_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ExpectVouched:
    """`who` holds vouchers for `tokens` of one job, beyond what it held when the scenario began."""

    tokens: int
    who: str = PROVIDER


@dataclass(frozen=True, slots=True)
class Cancel:
    """The reader hangs up."""

    job: str = "job"


@dataclass(frozen=True, slots=True)
class Crash:
    """kill -9."""

    who: str


@dataclass(frozen=True, slots=True)
class Restart:
    """The same home, a new process; the client knows its new offer when this is over."""

    who: str


@dataclass(frozen=True, slots=True)
class Freeze:
    """SIGSTOP: it keeps its connections and says nothing."""

    who: str


@dataclass(frozen=True, slots=True)
class Thaw:
    who: str


@dataclass(frozen=True, slots=True)
class ChainDown:
    """The RPC does not answer any more."""


@dataclass(frozen=True, slots=True)
class ChainUp: ...


@dataclass(frozen=True, slots=True)
class ExpectFinish:
    """`job` ended well with that many tokens, and they are the ones its first seed gives."""

    tokens: int
    reason: str = "length"
    job: str = "job"
    refunded: bool = False


@dataclass(frozen=True, slots=True)
class ExpectError:
    """`job` ended with this error. `after`: tokens its reader had by then, at least."""

    code: str
    job: str = "job"
    after: int = 0


@dataclass(frozen=True, slots=True)
class ExpectChain:
    """What `who` says of the chain in its status."""

    who: str
    reachable: bool


@dataclass(frozen=True, slots=True)
class ExpectEvidence:
    """The client kept the receipt that did not recompute."""

    job: str = "job"


@dataclass(frozen=True, slots=True)
class Work:
    """What one job is paid for: `refund_bps` of its cost given back. `tokens_at_most`: a range, both ends included."""

    tokens: int
    prompt: int = len(PROMPT)
    refund_bps: int = 0
    tokens_at_most: int | None = None

    def wei(self, tokens: int, factor: int) -> int:
        metered = self.prompt * PROMPT_PRICE + tokens * TOKEN_PRICE
        return factor * (metered - metered * self.refund_bps // 10_000)

    def at_least(self, factor: int = 1) -> int:
        return self.wei(self.tokens, factor)

    def at_most(self, factor: int = 1) -> int:
        return self.wei(self.tokens if self.tokens_at_most is None else self.tokens_at_most, factor)


@dataclass(frozen=True, slots=True)
class MustPay:
    """On chain, `to` was paid for exactly this work by `by` since the scenario began."""

    to: str
    work: tuple[Work, ...]
    by: str = CLIENT


@dataclass(frozen=True, slots=True)
class Purse:
    """All that `poor` ever gets: enough for a prompt and that many tokens."""

    tokens: int


Step = (
    Hold
    | Release
    | Lie
    | Ask
    | ExpectTokens
    | ExpectRunning
    | ExpectVouched
    | Cancel
    | Crash
    | Restart
    | Freeze
    | Thaw
    | ChainDown
    | ChainUp
    | ExpectFinish
    | ExpectError
    | ExpectChain
    | ExpectEvidence
    | MustPay
    | Purse
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`row`: the line of the termination table it shows, or what else it is about."""

    name: str
    row: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return self.name
