"""The ports: what each folder of node/ offers the others, and nothing else of it is known outside.

Longer than other files on purpose: signatures and their contracts only, on the one page everybody reads first.

Time and entropy are inputs (`Clock`, `Entropy`), so that whatever is wired together can be run again from a seed.
Every coroutine here may be cancelled; each states what it raises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from incentives.committee import CaseState as CaseState
from incentives.ledger import ChannelKey, CommitmentMade, Record, Role, SlotSeen, VerdictMade
from protocol.eip712 import Domain
from protocol.errors import TallyError
from protocol.frames import OfferEnvelope
from protocol.merkle import Entry, SumNode
from protocol.messages import (
    Accept,
    Commitment,
    JobRequest,
    Profile,
    Tariff,
    Verdict,
    Voucher,
    WorkReceipt,
)
from protocol.offers import CheckedOffer
from protocol.options import NO_OPTIONS, JobOptions
from protocol.transcript import Row
from protocol.units import (
    ZERO_DIGEST,
    Address,
    AuditOutcome,
    Digest,
    FinishReason,
    JobId,
    JobKind,
    Verifiability,
    Wei,
)

# --------------------------------------------------------------------------------------------------- time, entropy


class Clock(Protocol):
    """Wall time and sleeping."""

    def now_ms(self) -> int:
        """Unix milliseconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class Entropy(Protocol):
    """Secret random bytes."""

    def token(self, size: int) -> bytes: ...


# --------------------------------------------------------------------------------------------------------- transport


class TransportError(TallyError):
    """The network failed us: the operation may be tried again, elsewhere or later."""


class DialFailed(TransportError):
    """No connection to the peer could be made in the time given."""


class StreamEnded(TransportError):
    """The stream is over, by end of file, reset, timeout or a dead peer. Never a sign of success."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer can be reached. `addresses`: multiaddrs without the /p2p part (memory twin: any text)."""

    peer_id: str
    addresses: tuple[str, ...]


class Stream(Protocol):
    """One ordered, bidirectional conversation in frames of at most MAX_FRAME_BYTES bytes each."""

    @property
    def peer_id(self) -> str: ...

    @property
    def peer_address(self) -> Address:
        """EVM address that follows from the peer's authenticated secp256k1 key."""
        ...

    async def send(self, *frames: bytes) -> None:
        """Write frames, length-prefixed, in one go. Raises: StreamEnded, ValueError (frame too large)."""
        ...

    async def receive(self, timeout_s: float | None = None) -> bytes:
        """The next frame. Raises: StreamEnded (EOF, reset, timeout), FrameTooLarge (and the stream is reset)."""
        ...

    async def close(self) -> None:
        """Say that no more will be sent and let go. Never raises."""
        ...

    async def reset(self) -> None:
        """Drop the stream at once, both ways. Never raises."""
        ...


StreamHandler = Callable[[Stream], Awaitable[None]]
GossipHandler = Callable[[str, bytes], Awaitable[None]]  # (peer id of the author, payload)


class Transport(Protocol):
    """Direct streams, gossip and a peer directory between authenticated peers."""

    @property
    def peer_id(self) -> str: ...

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses others may dial, once started. Never 0.0.0.0."""
        ...

    async def start(self) -> None:
        """Raises: TransportError naming the address when a port is in use."""
        ...

    async def stop(self) -> None:
        """Close everything. Idempotent, never raises."""
        ...

    def serve(self, protocol_id: str, handler: StreamHandler) -> None:
        """Run `handler` for each inbound stream. What it raises resets that stream and nothing else."""
        ...

    async def open(self, peer: PeerAddress, protocol_id: str, timeout_s: float) -> Stream:
        """Raises: DialFailed."""
        ...

    async def publish(self, topic: str, payload: bytes) -> None:
        """Best effort gossip of at most MAX_FRAME_BYTES. Raises: TransportError when not running."""
        ...

    async def subscribe(self, topic: str, handler: GossipHandler) -> None: ...

    async def provide(self, key: bytes) -> None:
        """Announce in the DHT that this peer has something to say about `key` (32 bytes). A hint, best effort."""
        ...

    async def find_providers(self, key: bytes, limit: int) -> list[PeerAddress]:
        """Peers that announced `key`. A hint: stale, squattable, possibly empty."""
        ...

    def connected(self) -> tuple[str, ...]:
        """Peer ids with a live connection."""
        ...


# ------------------------------------------------------------------------------------------------------------ engine


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. Integers as in JobRequest: micro = value x 1_000_000; top_k 0 = no cut."""

    temperature_micro: int = 1_000_000
    top_p_micro: int = 1_000_000
    top_k: int = 0


class Urgency(IntEnum):
    """Who goes first in the engine. Batch work runs where nothing else wants to; priority may displace the rest."""

    BATCH = 0
    FLEX = 1
    STANDARD = 2
    PRIORITY = 3


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation. `seed`: 32 bytes. `options`: as signed (EOS is added to its stop ids by the engine).

    `salt`: 32 bytes naming whose prefix cache may be hit (per payer), b"" for neither reading nor filling it.
    `hold_s`: seconds from its end for which the prompt must stay in that cache if it is stated as kept.
    """

    prompt: tuple[int, ...]
    seed: bytes
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    options: JobOptions = NO_OPTIONS
    urgency: Urgency = Urgency.STANDARD
    salt: bytes = b""
    hold_s: int = 0


@dataclass(frozen=True, slots=True)
class EngineToken:
    """One generated token and its fingerprint.

    `logprob`: IEEE fp16 bits (2 bytes, big-endian) of the token's log-probability under the unmodified softmax.
    `projection`: 16 bytes, 8 fp16 values (big-endian): the last hidden state projected by the seed's matrix.
    `finish`: OPEN, or STOP / LENGTH on the last token. `cached_tokens`: how much of the prompt was a prefix-cache hit;
    `kept`: whether all its whole blocks are in the cache now. Both are the same on every token of a stream.
    `routing`: 8 bytes that fingerprint the experts chosen for it, b"" in a dense model. `alternatives`: the likeliest
    tokens with their log-probabilities (2 bytes each), likeliest first, as many as the options asked for.
    """

    token_id: int
    logprob: bytes
    projection: bytes
    finish: FinishReason
    cached_tokens: int = 0
    kept: bool = False
    routing: bytes = b""
    alternatives: tuple[tuple[int, bytes], ...] = ()


class EngineFull(TallyError):
    """No slot and no queue place is free, or the request can never fit; says which limit."""


class UnfitRequest(TallyError):
    """What the caller asked for turned out impossible while it ran, by no fault of the engine: a grammar that leads
    nowhere. What was computed until then is the caller's loss."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's load. `kv_bytes`: memory that KV slots and prefix cache take. `*_total`: since start.

    `busy_s`: seconds in which the engine computed. `prompt_total`, `cached_total`: prompt tokens read, and those of
    them that the prefix cache held. `preempted_total`: streams that made room for a more urgent one and went on later.
    """

    slots: int
    active: int
    queued: int
    kv_bytes: int
    tokens_total: int
    prompt_total: int = 0
    cached_total: int = 0
    preempted_total: int = 0
    busy_s: float = 0.0


class TokenStream(Protocol):
    """One generation under way. Reading slowly pauses it; `aclose` ends it and frees its slot at once."""

    def __aiter__(self) -> AsyncIterator[EngineToken]: ...

    async def __anext__(self) -> EngineToken: ...

    async def aclose(self) -> None:
        """Idempotent, never raises."""
        ...


class Engine(Protocol):
    """Tokens in, tokens and fingerprints out; no text."""

    @property
    def profile(self) -> Profile: ...

    @property
    def max_context(self) -> int:
        """Longest prompt plus output, tokens."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int:
        """Numbers of an embedding; 0 when this engine has none to give."""
        ...

    @property
    def verifiability(self) -> Verifiability:
        """What its output can be checked by, stated in the offer."""
        ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def submit(self, request: EngineRequest) -> TokenStream:
        """Queue a generation and stream it. A grammar is compiled first, off the event loop.

        Raises: EngineFull at once; ValueError for token ids, parameters or a grammar that cannot be served.
        """
        ...

    async def embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int, urgency: Urgency) -> tuple[bytes, ...]:
        """One unit vector per input: the mean of the final-normed hidden states of its tokens, cut to `dimensions`
        (0: all) and normalised again; fp32 little-endian.

        Raises: EngineFull; ValueError for token ids, lengths or dimensions out of range.
        """
        ...

    def wait_ms(self, urgency: Urgency, prompt_tokens: int) -> int:
        """Estimated milliseconds to the first token of such a request if it came now."""
        ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """A finished generation to look at again. `rows`: the output as recorded in the transcript, in order."""

    prompt: tuple[int, ...]
    rows: tuple[Row, ...]
    seed: bytes
    sampling: Sampling
    options: JobOptions


@dataclass(frozen=True, slots=True)
class Replay:
    """What one prefill over prompt and output shows, one number per output token.

    `margins`: logits (sampling.py; inf outside the tolerant nucleus). `logprobs`: absolute distance of the recorded
    log-probability, nats. `projections`: relative distance of the recorded projection. `routing`: whether the experts
    recorded are those chosen now (always True in a dense model). `gaps`: logits between the best and the second score.
    `ends`: output indices at which the job had to stop, by its stop ids or EOS.
    """

    margins: tuple[float, ...]
    logprobs: tuple[float, ...]
    projections: tuple[float, ...]
    routing: tuple[bool, ...]
    gaps: tuple[float, ...]
    ends: tuple[int, ...]


class Unreplayable(TallyError):
    """One job that this machine cannot look at: a grammar that takes it too long to compile. Says nothing about who
    served the job, on a machine that could."""


class Replayer(Protocol):
    """Looks at finished work again, with the weights of one profile. No decoding."""

    @property
    def profile(self) -> Profile: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def replay(self, request: ReplayRequest) -> Replay:
        """Raises: ValueError for token ids, lengths or parameters that could never have been served, whatever the
        machine; Unreplayable where another machine may do better."""
        ...

    async def embed(self, inputs: Sequence[tuple[int, ...]], dimensions: int) -> tuple[bytes, ...]:
        """As Engine.embed. Raises: ValueError."""
        ...


# ------------------------------------------------------------------------------------------------------------- store


class StoreError(TallyError):
    """The database cannot be used; says which file and what to do."""


@dataclass(frozen=True, slots=True)
class ChannelAccount:
    """One channel, as this node's own records and its last look at the chain have it. All in wei.

    `owed`: sum of the totals of all jobs, each at its last acknowledged receipt (client: vouched for).
    `vouched`: highest voucher held (provider) or signed (client), with its signature (provider; b"" otherwise).
    """

    key: ChannelKey
    owed: Wei
    vouched: Wei
    voucher_signature: bytes
    deposit: Wei
    claimed: Wei
    exit_at: int
    owner: Address


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job as stored. `steps`: acknowledged increments. `owed`: wei of the last acknowledged receipt."""

    role: Role
    job_id: JobId
    request: JobRequest
    request_signature: bytes
    accept: Accept
    accept_signature: bytes
    model: str
    options: bytes
    steps: int
    owed: Wei
    closed: FinishReason | None
    detail: str
    opened_at_ms: int


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """One receipt as stored, with whatever signatures this node holds (b"" where it holds none)."""

    role: Role
    digest: Digest
    receipt: WorkReceipt
    receipt_signature: bytes
    ack_signature: bytes
    voucher: Voucher | None
    voucher_signature: bytes
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SettlementRow:
    """One settlement transaction. `state`: sent, mined or dropped."""

    transaction: Digest
    state: str
    block: int
    gas: int
    gas_wei: int
    paid: Wei
    fee: Wei
    vouchers: tuple[tuple[Address, Wei], ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a job's transcript needs beside its documents. `content`: leaves or vectors, in order (OutputKept)."""

    salt: bytes
    prompt: tuple[int, ...]
    content: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CommitmentRow:
    """One commitment of this provider. `record`: as journaled."""

    record: CommitmentMade
    made_at_ms: int


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """One verdict of this validator. `record`: as journaled."""

    record: VerdictMade
    made_at_ms: int


class Store(Protocol):
    """The journal and what is read back from it. One process at a time holds it (lock file)."""

    async def open(self) -> None:
        """Migrate and check. Raises: StoreError (corrupt, locked by another process, from a newer version)."""
        ...

    async def close(self) -> None: ...

    async def write(self, *records: Record) -> None:
        """Durable (fsynced) when it returns; all records of a call in one transaction; calls are group-committed.

        Raises: StoreError; then nothing of this call was kept and the caller must not sign or act.
        """
        ...

    async def account(self, key: ChannelKey) -> ChannelAccount | None: ...

    async def accounts(self, role: Role) -> list[ChannelAccount]: ...

    async def job(self, job_id: JobId) -> JobRow | None: ...

    async def jobs(self, role: Role, *, open_only: bool = False, limit: int = 1000) -> list[JobRow]: ...

    async def receipts(
        self, *, role: Role | None = None, job_id: JobId | None = None, final_only: bool = False, limit: int = 1000
    ) -> list[ReceiptRow]: ...

    async def receipt(self, digest_prefix: bytes) -> ReceiptRow | None: ...

    async def settlements(self, *, state: str | None = None, limit: int = 1000) -> list[SettlementRow]: ...

    async def kept(self, role: Role, job_id: JobId) -> Kept | None:
        """A job's kept content; None when it was never kept or its key is destroyed."""
        ...

    async def kept_before(self, role: Role, opened_before_ms: int, limit: int = 1000) -> list[JobId]:
        """Jobs opened earlier than that whose content is still kept, oldest first."""
        ...

    async def commitment(self, key: Digest) -> CommitmentRow | None: ...

    async def commitments(self, limit: int = 1000) -> list[CommitmentRow]:
        """Newest first."""
        ...

    async def verdict(self, case_id: Digest, round_: int) -> VerdictRow | None: ...

    async def verdicts(self, limit: int = 1000) -> list[VerdictRow]:
        """Newest first."""
        ...

    async def get_value(self, key: str) -> bytes | None:
        """A small durable setting (event cursor, sequence numbers)."""
        ...

    async def put_value(self, key: str, value: bytes) -> None: ...


# ------------------------------------------------------------------------------------------------------------- chain


class ChainError(TallyError):
    """The chain refused or could not be understood; says what was kept safe and what to do."""


class ChainUnavailable(ChainError):
    """The RPC does not answer (down, timeout, rate limit): try again later; confirmed knowledge stays valid."""


@dataclass(frozen=True, slots=True)
class ProviderRecord:
    """What the Registry says of a provider wallet. Stake in wei."""

    wallet: Address
    node_key: Address
    stake: Wei


@dataclass(frozen=True, slots=True)
class StakeRecord:
    """What a wallet has staked, in wei. `unbonding`: leaves from `release_at` (Unix seconds) on; it can be slashed
    until then."""

    active: Wei
    unbonding: Wei
    release_at: int


@dataclass(frozen=True, slots=True)
class TariffRecord:
    """What the Registry's log says of a tariff hash. Unix seconds."""

    provider: Address
    valid_from: int
    valid_until: int


@dataclass(frozen=True, slots=True)
class Mined:
    """A transaction in a block."""

    transaction: Digest
    block: int
    gas: int
    gas_wei: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What a settlement paid: to the provider (before fee), the fee, and per session key its new claimed total."""

    mined: Mined
    paid: Wei
    fee: Wei
    claimed: tuple[tuple[Address, Wei], ...]


@dataclass(frozen=True, slots=True)
class PreparedSettlement:
    """A signed settlement transaction, not yet broadcast: journal its hash first, then send."""

    transaction: Digest
    raw: bytes
    vouchers: tuple[tuple[Address, Wei], ...]


@dataclass(frozen=True, slots=True)
class CapacityTerms:
    """What a provider sells ahead for a profile. `capacity`: micro-STE per second that may be sold at any instant.

    `price`: wei per STE. `min_periods`, `max_periods`: of one purchase; a maximum of 0 sells nothing. The minimum is
    the notice a holder may quit with as well.
    """

    capacity: int
    price: Wei
    min_periods: int
    max_periods: int


@dataclass(frozen=True, slots=True)
class ReservationOrder:
    """A purchase. `rate`: micro-STE per second. `first`, `periods`: which periods. `session`: whose jobs may use it.

    `max_cost`: wei that are paid at most, whatever the price became meanwhile.
    """

    provider: Address
    profile_id: Digest
    rate: int
    first: int
    periods: int
    session: Address
    max_cost: Wei


@dataclass(frozen=True, slots=True)
class ReservationRecord:
    """A right to capacity, as the chain has it. `rate`: micro-STE per second. `start`, `end`: Unix seconds, [from, to).

    `session`: whose jobs may use it, zero for nobody's. `notice`: periods it goes on for when its holder quits.
    `per_period`: wei it costs a period; `claimed`: wei that went to the provider so far, fee included.
    """

    id: Digest
    provider: Address
    profile_id: Digest
    holder: Address
    session: Address
    rate: int
    start: int
    end: int
    notice: int
    per_period: Wei
    claimed: Wei


@dataclass(frozen=True, slots=True)
class ChainHead:
    """The newest block seen. `age_s`: seconds since it was seen to change or confirmed to be newest."""

    number: int
    hash: Digest
    timestamp: int


SlotHandler = Callable[[SlotSeen], Awaitable[None]]


class Chain(Protocol):
    """The contracts as this node needs them. Amounts in wei of TALLY unless named otherwise."""

    @property
    def domain(self) -> Domain: ...

    async def start(self) -> None:
        """Connect and check the chain id and contract code. Raises: ChainUnavailable, ChainError (wrong chain)."""
        ...

    async def stop(self) -> None: ...

    async def head(self) -> ChainHead: ...

    async def slot(self, key: ChannelKey) -> SlotSeen | None:
        """The escrow slot at the confirmed head, or None when it was never opened."""
        ...

    async def watch_slots(self, provider: Address, handler: SlotHandler) -> None:
        """Call `handler` for every slot of `provider` that opened or changed, now and for ever (until cancelled).

        Reorg-aware: a slot whose event vanished is reported again as the chain then has it.
        """
        ...

    async def provider_by_node_key(self, node_key: Address) -> ProviderRecord | None: ...

    async def provider(self, wallet: Address) -> ProviderRecord | None: ...

    async def tariff(self, tariff_hash: Digest) -> TariffRecord | None: ...

    async def last_sequence(self, provider: Address, profile_id: Digest) -> int:
        """The highest tariff sequence in the newest block's log for this wallet and profile; 0 when there is none."""
        ...

    async def token_balance(self, account: Address) -> Wei: ...

    async def coin_balance(self, account: Address) -> int:
        """Wei of the chain's own coin (for gas)."""
        ...

    async def earned(self, provider: Address) -> Wei:
        """Settled and not yet collected."""
        ...

    async def open_channel(self, provider: Address, session_secret: bytes, amount: Wei) -> Mined:
        """Approve if needed and open, or top up an open one, from this node's wallet."""
        ...

    async def request_exit(self, key: ChannelKey) -> Mined: ...

    async def exit(self, key: ChannelKey) -> Mined: ...

    async def register_provider(self, node_secret: bytes, stake: Wei) -> None:
        """Register the node key and bring the stake up to `stake`. Idempotent."""
        ...

    async def stake_of(self, wallet: Address) -> StakeRecord:
        """At the newest block."""
        ...

    async def key_holder(self, node_key: Address) -> Address | None:
        """The wallet that a node key signs for, or signed for before it was retired."""
        ...

    async def request_unbond(self, amount: Wei) -> Mined:
        """Begin to take stake back; it stays slashable for the unbonding delay."""
        ...

    async def withdraw_stake(self) -> Mined:
        """Take unbonded stake back. Raises: ChainError while it is still bonded."""
        ...

    async def log_tariff(self, tariff: Tariff, signature: bytes) -> Mined: ...

    async def epoch_seconds(self) -> int: ...

    async def prepare_settlement(
        self, provider: Address, vouchers: Sequence[tuple[Address, Wei, bytes]]
    ) -> PreparedSettlement:
        """Sign a settlement of (client, cumulative, signature) items with the next nonce; nothing is sent."""
        ...

    async def send_settlement(self, prepared: PreparedSettlement) -> Settled:
        """Broadcast and wait for it. Raises: ChainUnavailable, ChainError (reverted, replaced)."""
        ...

    async def settlement_result(self, transaction: Digest) -> Settled | None:
        """What a transaction sent earlier (perhaps before a crash) did, or None while it is in no block."""
        ...

    async def collect(self, provider: Address) -> Mined:
        """Send the provider wallet what it earned."""
        ...

    async def reservation(self, reservation_id: Digest) -> ReservationRecord | None:
        """A right to capacity at the confirmed head, or None when there is none."""
        ...

    async def reservations(self, account: Address) -> list[ReservationRecord]:
        """The rights that `account` holds or sold, ended ones included, at the confirmed head, by start and id."""
        ...

    async def capacity(self, provider: Address, profile_id: Digest) -> CapacityTerms | None:
        """What a provider sells ahead, in the newest block; None when it never offered any."""
        ...

    async def period_seconds(self) -> int:
        """Length of the periods that capacity is sold by; period p begins at Unix second p * length."""
        ...

    async def offer_capacity(self, profile_id: Digest, terms: CapacityTerms) -> Mined:
        """State what this node's wallet sells ahead. Raises: ChainError, also when more is sold than `terms` allow."""
        ...

    async def buy_reservation(self, order: ReservationOrder) -> tuple[Digest, Mined]:
        """Approve if needed and buy; the right's id. Raises: ChainError, also when it is sold out or costs more."""
        ...

    async def transfer_reservation(self, reservation_id: Digest, to: Address) -> Mined:
        """Give a right away; no session key may use it until the new holder assigns one."""
        ...

    async def assign_reservation(self, reservation_id: Digest, session: Address) -> Mined:
        """Let jobs of that session key use a right this wallet holds, instead of another's."""
        ...

    async def quit_reservation(self, reservation_id: Digest) -> Mined:
        """As its holder, end a right after its notice and take the rest of its price back."""
        ...

    async def release_reservation(self, reservation_id: Digest) -> Mined:
        """As its provider, end a right now; what is unearned goes back to its holder."""
        ...

    async def claim_reservation(self, provider: Address, reservation_ids: Sequence[Digest]) -> Mined:
        """Send the provider what it earned with these rights by now."""
        ...


# ------------------------------------------------------------------------------------------------------------- court


@dataclass(frozen=True, slots=True)
class CourtRules:
    """Constants of the deployed Court. Times in seconds, amounts in wei.

    `commit_window`: from an epoch's end until its commitment is overdue. `submit_window`, `reveal_window`: of each
    round at most. `answer_window`: from a guilty verdict to its execution. `committees`: members per round.
    `forced_bps`: chance in 10^4 that a commitment obliges the next one to hold an error made on purpose.
    """

    epoch_seconds: int
    commit_window: int
    submit_window: int
    reveal_window: int
    answer_window: int
    committees: tuple[int, int, int]
    validator_stake: Wei
    validator_penalty: Wei
    appeal_bond: Wei
    forced_bps: int = 0


@dataclass(frozen=True, slots=True)
class CommitmentRecord:
    """A commitment as the Court keeps it. `lot`: see Commitment. `beacon`: zero until the case is drawn.

    `earlier`: jobs this provider committed to under the profile before it.
    """

    key: Digest
    provider: Address
    profile_id: Digest
    epoch: int
    root: Digest
    count: int
    total: Wei
    lot: Digest
    block: int
    beacon: Digest
    earlier: int


@dataclass(frozen=True, slots=True)
class CaseMember:
    """One seat of the current round. `submitted`: the verdict's digest, or zero. `verdict`: once revealed."""

    validator: Address
    submitted: Digest
    verdict: Verdict | None
    credited: bool


@dataclass(frozen=True, slots=True)
class CaseRecord:
    """A case as the Court has it now. `until`: Unix second at which the state's window ends. `members`: of `round`.

    `outcome`: of the last quorum. `evidence`: the provider's e-value after it, in 1e-18. `slashed`: wei.
    `was_forced`: the accused showed that this commitment had to hold an error.
    """

    id: Digest
    provider: Address
    profile_id: Digest
    epoch: int
    state: CaseState
    round: int
    until: int
    outcome: AuditOutcome
    members: tuple[CaseMember, ...]
    evidence: int
    slashed: Wei
    was_forced: bool


@dataclass(frozen=True, slots=True)
class CourtEvent:
    """Something the Court logged. `name`: the Solidity event. `case_id`: the commitment's key it is about, or zero.

    `about`: the wallet it is about, or zero. `values`: the event's other arguments by name.
    """

    name: str
    block: int
    case_id: Digest
    about: Address
    values: dict[str, int | bytes]


class Court(Protocol):
    """The Court contract as this node needs it. Sending calls act from this node's wallet.

    Every call raises ChainUnavailable; sending ones ChainError too, when the contract refuses.
    """

    @property
    def domain(self) -> Domain: ...

    async def rules(self) -> CourtRules: ...

    async def now(self) -> int:
        """Unix seconds of the newest block, or of the wall clock when that is later."""
        ...

    async def events(self, first_block: int) -> tuple[list[CourtEvent], int]:
        """What was logged from that block on, in order, and the block to ask from next time."""
        ...

    async def commitment(self, key: Digest) -> CommitmentRecord | None: ...

    async def case(self, case_id: Digest) -> CaseRecord | None: ...

    async def validators(self) -> tuple[Address, ...]:
        """Enlisted wallets, in the Court's order."""
        ...

    async def evidence(self, provider: Address) -> int:
        """The provider's e-value, in 1e-18."""
        ...

    async def credits(self, validator: Address) -> tuple[int, int]:
        """(credited tokens, missed reveals) so far: what validation pay will follow from."""
        ...

    async def profile_registered(self, profile_id: Digest) -> bool: ...

    async def register_profile(self, profile: Profile) -> Mined:
        """Make the profile one that providers can be judged under. Raises: ChainError for a flag rate too high."""
        ...

    async def enlist(self) -> Mined:
        """Be drawn for committees from now on: needs a node key and the validators' stake."""
        ...

    async def retire(self) -> Mined: ...

    async def post_commitment(self, commitment: Commitment, signature: bytes) -> Mined: ...

    async def draw(self, case_id: Digest) -> Mined:
        """Fix the beacon of a commitment at least two blocks old and open its case."""
        ...

    async def submit(self, case_id: Digest, verdict_digest: Digest) -> Mined: ...

    async def reveal(self, verdict: Verdict) -> Mined: ...

    async def conclude(self, case_id: Digest) -> Mined:
        """Count the round: a verdict, or the next round, or no verdict."""
        ...

    async def execute(self, case_id: Digest) -> Mined:
        """Carry out a verdict whose answer window is over."""
        ...

    async def answer(self, case_id: Digest, secret: bytes) -> Mined:
        """As the accused: show that the error was forced."""
        ...

    async def appeal(self, case_id: Digest) -> Mined:
        """As the accused: put up the bond and ask for the next, larger committee."""
        ...

    async def prove(self, kind: int, proof: bytes) -> Mined:
        """Punish an objective fault (contracts/src/IFaults.sol) for the reporter's share."""
        ...

    async def compensation(
        self, case_id: Digest, entry: Entry, index: int, siblings: Sequence[SumNode], receipt: WorkReceipt
    ) -> Mined:
        """Send the payer of a committed job its share of a slash. `receipt`: whose digest the entry holds."""
        ...


# ---------------------------------------------------------------------------------------------------------- directory


class Directory(Protocol):
    """The offers this node knows: its own, what gossip brought, and what it pulled from its bootstrap peers."""

    async def announce(self, envelope: OfferEnvelope) -> None:
        """Publish our own offer and answer with it from now on."""
        ...

    async def refresh(self) -> None:
        """Pull from the bootstrap peers now. Never raises: unreachable peers are logged."""
        ...

    def offers(self) -> list[CheckedOffer]:
        """Offers that are alive, signed, staked, and under a tariff that the chain has logged."""
        ...


# -------------------------------------------------------------------------------------------------------- marketplace


class NoProvider(TallyError):
    """No provider meets the request's hard limits now; says which limit ruled them out."""


class InsufficientFunds(TallyError):
    """Escrow or wallet cannot cover the job; says how much is missing and how to top up."""


class JobFailed(TallyError):
    """The job ended without END from any provider. What was delivered was paid for, and nothing more."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Everything a client needs to turn text into this profile's tokens and back; checked against the profile's hashes.

    `tokenizer_json`: the Hugging Face tokenizers file. `special`: names to texts (bos_token, eos_token, ...).
    """

    model: str
    profile_id: Digest
    profile: Profile
    tokenizer_json: bytes
    chat_template: str
    special: dict[str, str]
    eos_ids: tuple[int, ...]
    max_context: int


@dataclass(frozen=True, slots=True)
class MarketEntry:
    """One live offer, as `tally market` and /v1/models show it. Prices in wei per token."""

    model: str
    provider: Address
    peer_id: str
    tariff: Tariff
    slots: int
    load_bps: int
    max_context: int
    max_output: int
    region: str
    expires_at: int
    profile: Digest
    verifiability: Verifiability
    base_bps: int


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a caller wants done. `price_ceiling`: most wei for the whole job, None for the configured default.

    `options`: the client role fills in `continued` and `reasoning_open`; the rest is the caller's. An embedding
    job's prompt is its texts one after the other, with `max_tokens` 0. `cache_salt`: 32 secret bytes to keep this job's
    prefix cache apart from the caller's others, or none for the client's own. `reservation`: capacity bought before.
    `only`: providers that may take it, all when empty. `messages`: the (role, content) pairs that a chat's prompt was
    made from, for a platform outside that takes no tokens; () for any other prompt, and where tools are spoken of.
    """

    model: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    options: JobOptions = NO_OPTIONS
    kind: JobKind = JobKind.GENERATE
    tier: int = 1
    private: bool = False
    price_ceiling: Wei | None = None
    deadline_s: float = 600.0
    reservation: Digest = ZERO_DIGEST
    cache_salt: bytes = b""
    only: frozenset[Address] = frozenset()
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class JobStarted:
    """A provider accepted. Sent again, with another job id, when a failover provider takes over."""

    job_id: JobId
    provider: Address
    tariff: Tariff
    failover: bool


@dataclass(frozen=True, slots=True)
class JobOutside:
    """A platform outside the market answers, in place of any JobStarted: nothing is receipted, vouched for or checked.

    `host`: of its URL. `model`: its name there. The job's cost is what the platform's published prices come to.
    """

    host: str
    model: str


@dataclass(frozen=True, slots=True)
class JobTokens:
    """Tokens in order, each once, across failovers. `logprobs`: natural log, one per token.

    `alternatives`: per token the likeliest tokens with their logprobs; () when none were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class JobVectors:
    """Vectors of an embedding job in order of its texts, fp32 little-endian, unit length."""

    vectors: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class JobPaid:
    """An increment was vouched for. `total`: wei for the whole stream so far, over all its providers."""

    total: Wei


@dataclass(frozen=True, slots=True)
class JobDone:
    """The stream ended, with a final receipt unless it ran outside. Counts as OpenAI's usage.

    `cost`: wei over all its providers. `receipts`: digests of the final (or last vouched) receipt of each provider
    that worked on it.
    """

    finish: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    ste_micro: int
    cost: Wei
    refund: Wei
    job_ids: tuple[JobId, ...]
    receipts: tuple[Digest, ...]


JobEvent = JobStarted | JobOutside | JobTokens | JobVectors | JobPaid | JobDone


class Marketplace(Protocol):
    """The client role, as the gateway and the command line use it."""

    async def market(self) -> list[MarketEntry]:
        """Live, verified offers known now, cheapest first."""
        ...

    async def card(self, model: str) -> ModelCard:
        """Raises: NoProvider when nobody offers `model`."""
        ...

    def run(self, spec: JobSpec) -> AsyncIterator[JobEvent]:
        """Run one job; the last event is JobDone. Closing the iterator cancels the job and pays what was delivered.

        Raises: NoProvider, InsufficientFunds, Refused, JobFailed.
        """
        ...

    async def status(self) -> dict[str, object]:
        """Peers, channels, spending: plain JSON values for `tally status` and /api/v1/status."""
        ...
