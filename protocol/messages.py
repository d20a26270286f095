"""Every signed document, one frozen dataclass each: the single source of type hash, digest and Solidity struct.

Static fields only: text and lists enter as hashes, and travel beside the document in the frame that carries it.
contracts/generate.py writes contracts/src/Types.sol and tests/vectors/eip712.json from this file.
`provider` is always the provider's wallet (which holds stake); its registered node key signs for it.
`client` is always the session key that opened the channel with that provider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.eip712 import B32, U8, U32, U64, U96, Addr, Bool


@dataclass(frozen=True, slots=True)
class Tariff:
    """A provider's price sheet for one profile, the same for every payer. Signed by the node key, logged on chain.

    Prices: wei per token. `*_bps`: multiplier or share in basis points; a tier at 0 is not offered. `*_ms`: promised
    milliseconds. `embedding_price`: wei per token read by an embedding job. `cache_ttl_s`: how long a prompt that a
    receipt states as kept is held, 0 for no promise. `base_*_bps`: bounds of the base multiplier (base_price.py).
    `valid_from`, `valid_until`: Unix seconds.
    """

    provider: Addr
    sequence: U64
    profile_id: B32
    prompt_price: U96
    cached_price: U96
    completion_price: U96
    reasoning_price: U96
    per_request: U96
    flex_bps: U32
    standard_bps: U32
    priority_bps: U32
    flex_ttft_ms: U32
    standard_ttft_ms: U32
    priority_ttft_ms: U32
    flex_tpot_ms: U32
    standard_tpot_ms: U32
    priority_tpot_ms: U32
    flex_refund_bps: U32
    standard_refund_bps: U32
    priority_refund_bps: U32
    long_context_threshold: U32
    long_context_bps: U32
    privacy_bps: U32
    reserved_discount_bps: U32
    embedding_price: U96
    cache_ttl_s: U32
    base_min_bps: U32
    base_max_bps: U32
    valid_from: U64
    valid_until: U64


@dataclass(frozen=True, slots=True)
class Offer:
    """What a provider serves now. Signed by the node key, whose PeerId follows from the key.

    `box_key`: X25519 public key of this epoch. `model_hash`, `region_hash`: keccak256 of the UTF-8 text.
    `load_bps`: share of slots busy. `retention_hours`: how long content may be kept. `expires_at`: Unix seconds.
    `base_*`: this epoch's base multiplier, the one before, and the utilisation it follows from (base_price.py).
    """

    provider: Addr
    sequence: U64
    box_key: B32
    model_hash: B32
    profile_id: B32
    slots: U32
    load_bps: U32
    max_context: U32
    max_output: U32
    tariff_hash: B32
    region_hash: B32
    retention_hours: U32
    verifiability: U8
    base_epoch: U64
    base_bps: U32
    base_parent_bps: U32
    base_utilisation_bps: U32
    expires_at: U64


@dataclass(frozen=True, slots=True)
class Profile:
    """What exactly computes: two nodes of one profile id write the same text from the same seed.

    `weights_root`: SHA-256 over the sorted weight files. `active_parameters`, `total_parameters`: counts.
    `margin_milli` (logits x 1000), `logprob_micro` (nats x 1e6) and `projection_micro` (relative distance x 1e6):
    beyond any of them an audited token is flagged. `flag_ppm`: rate of flags granted to honest work (calibration).
    The layer shape fields are those of the STE formula (protocol/metering.py). `moe_layers`: layers with a router,
    whose choices each token's leaf records. `reasoning_start`, `reasoning_end`: token ids that open and close a
    reasoning block, both 0 when the template has none.
    """

    weights_root: B32
    tokenizer_hash: B32
    chat_template_hash: B32
    special_policy_hash: B32
    dtype_hash: B32
    kv_dtype_hash: B32
    engine_hash: B32
    sampler_hash: B32
    margin_milli: U32
    logprob_micro: U32
    projection_micro: U32
    flag_ppm: U32
    active_parameters: U64
    total_parameters: U64
    body_parameters: U64
    head_parameters: U64
    layers: U32
    heads: U32
    head_dim: U32
    window: U32
    moe_layers: U32
    experts: U32
    experts_chosen: U32
    reasoning_start: U32
    reasoning_end: U32


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job, signed by the client's session key. Its EIP-712 digest is the job id.

    `prompt_hash`: SHA-256(salt || token ids as u32 big-endian). `*_micro`: value times 1_000_000.
    `kind`: a JobKind. `top_k` 0 and `top_p_micro` 1_000_000 mean no cut. `options_hash`: over the options beside the
    request (options.py). `base_bps`: the offer's base multiplier this job is priced at, or x1 less the reserved
    discount when `reservation` names one. `price_ceiling`: most wei this job may cost.
    `provider_commitment`: SHA-256 of the provider's nonce, from its quote. `deadline`: Unix milliseconds.
    `parent_job`, `parent_seed`: zero, or the job whose stream this one continues, and its seed.
    """

    provider: Addr
    client: Addr
    profile_id: B32
    kind: U8
    prompt_hash: B32
    prompt_tokens: U32
    max_tokens: U32
    temperature_micro: U32
    top_p_micro: U32
    top_k: U32
    options_hash: B32
    tier: U8
    is_private: Bool
    tariff_hash: B32
    base_bps: U32
    reservation: B32
    price_ceiling: U96
    client_nonce: B32
    provider_commitment: B32
    client_box_key: B32
    deadline: U64
    parent_job: B32
    parent_seed: B32


@dataclass(frozen=True, slots=True)
class Accept:
    """The provider takes the job and opens its nonce; `seed` = SHA-256(job id || client nonce || provider nonce),
    or the parent's seed when the job continues one. `accepted_at`: Unix milliseconds."""

    job_id: B32
    provider_nonce: B32
    seed: B32
    accepted_at: U64


@dataclass(frozen=True, slots=True)
class WorkReceipt:
    """The provider's half of the stick, one per increment; the last has `is_final`.

    Counts and money are totals of the job so far, so each receipt recomputes from scratch with one rounding. `kind`,
    `tier`, `is_private`, `base_bps` and `reservation` repeat the request, so that receipt and tariff prove a price.
    `cache_head`, `prompt_head`: block chain over what was hit, and over the prompt (cache.py), zero for none;
    `is_kept`: the provider holds all of the latter now.
    `ste_micro`: standard token equivalents x 1e6. `leaves_root`: hash-chain head over the transcript's leaves.
    `routing_root`: hash-chain head over the experts chosen, zero for a dense model.
    `*_at`: Unix milliseconds (zero where it has not happened). `waited_ms`: time spent waiting for vouchers.
    `*_line`: wei before multipliers, exact. `multiplier`: product of the four basis-point multipliers, so x1 is
    10**16. `total`: wei. `vouched`: highest voucher held for this channel when this was signed. `previous`: digest of
    this job's previous receipt, or zero.
    """

    provider: Addr
    client: Addr
    job_id: B32
    kind: U8
    tier: U8
    is_private: Bool
    base_bps: U32
    reservation: B32
    step: U32
    is_final: Bool
    prompt_tokens: U32
    cached_tokens: U32
    completion_tokens: U32
    reasoning_tokens: U32
    cache_head: B32
    prompt_head: B32
    is_kept: Bool
    ste_micro: U64
    leaves_root: B32
    routing_root: B32
    finish_reason: U8
    received_at: U64
    first_token_at: U64
    finished_at: U64
    waited_ms: U32
    prompt_line: U96
    cached_line: U96
    completion_line: U96
    reasoning_line: U96
    multiplier: U64
    per_request: U96
    refund: U96
    total: U96
    vouched: U96
    tariff_hash: B32
    previous: B32


@dataclass(frozen=True, slots=True)
class ReceiptAck:
    """The client's half of the stick: it recounted the receipt and agrees."""

    receipt: B32


@dataclass(frozen=True, slots=True)
class Voucher:
    """A promise of `cumulative` wei in all to `provider`, from the channel of the session key that signed it."""

    provider: Addr
    cumulative: U96


@dataclass(frozen=True, slots=True)
class SessionConsent:
    """A session key agrees to sign for `owner`'s channel with `provider`. `deadline`: Unix seconds."""

    owner: Addr
    provider: Addr
    deadline: U64


@dataclass(frozen=True, slots=True)
class NodeKeyConsent:
    """A node key agrees to sign for `wallet`. `deadline`: Unix seconds."""

    wallet: Addr
    deadline: U64


@dataclass(frozen=True, slots=True)
class Commitment:
    """A provider's jobs of one epoch and profile: Merkle-sum root (merkle.py), count and total wei.

    A job belongs to the epoch of its receipts' `received_at`. `lot`: keccak256 of the secret that decides, with the
    beacon drawn later, whether this commitment had to hold a forced error.
    """

    provider: Addr
    profile_id: B32
    epoch: U64
    root: B32
    count: U32
    total: U96
    lot: B32


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one validator found in one round of a case. Its digest is committed first, the document revealed later.

    `case_id`: the commitment's key. `outcome`: an AuditOutcome. `tokens`, `flags`, `voids`: over all audited jobs,
    `worst_*`: of the job with the least likely flags. `gaps`: 16 big-endian int16, thousandths of a logit between the
    best and the second score at the beacon's positions. `results_root`: SHA-256 over the per-job results (verdicts.py).
    """

    validator: Addr
    case_id: B32
    round: U8
    outcome: U8
    tokens: U32
    flags: U32
    voids: U32
    worst_tokens: U32
    worst_flags: U32
    worst_voids: U32
    gaps: B32
    results_root: B32
    salt: B32


DOCUMENTS: Final = (
    Tariff,
    Offer,
    Profile,
    JobRequest,
    Accept,
    WorkReceipt,
    ReceiptAck,
    Voucher,
    SessionConsent,
    NodeKeyConsent,
    Commitment,
    Verdict,
)
"""All documents, in the order they are generated in."""
