"""Cheats that stand in documents: each is written by the adversary's own code, and held against the checks that see it.

One honest job is signed by both sides; every cheat is that job with one thing false. `client`: what the paying side
finds by its own account. `proof`: the fault that signed documents prove to anybody. `audit`: what examining the dossier
says to a validator, without a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from devnet.adversaries.providers import ForgettingCache, Overcharging, OverCounting, seal_for_another, victim
from incentives.audit_draw import pack_gaps
from incentives.committee import Vote, decide
from incentives.evidence import Evidence
from incentives.fairness import entry_of
from incentives.faults import charge_findings, hidden_hit, two_receipts
from incentives.prefixes import Prefixes
from protocol.cache import BLOCK_TOKENS, block_heads
from protocol.dossier import Dossier, Forged, examine
from protocol.eip712 import Domain, digest, hash_struct
from protocol.errors import TallyError
from protocol.merkle import Entry, ordered, prove, root, verify
from protocol.messages import Accept, JobRequest, Offer, Profile, Tariff, WorkReceipt
from protocol.offers import text_hash
from protocol.options import NO_OPTIONS, encode_options, options_hash
from protocol.packing import unpack
from protocol.sampling import derive_seed
from protocol.signing import Signer
from protocol.transcript import Leaf, Row, prompt_hash
from protocol.units import (
    BPS,
    ZERO_ADDRESS,
    ZERO_DIGEST,
    Address,
    AuditOutcome,
    Digest,
    FinishReason,
    JobId,
    JobKind,
    Tier,
    Verifiability,
    Wei,
)
from protocol.work import Work, check_receipt, nonce_commitment

DOMAIN: Final = Domain(31337, Address(b"\x11" * 20))
NODE: Final = Signer.from_secret(b"\x01" * 32)
CLIENT: Final = Signer.from_secret(b"\x02" * 32)
WALLET: Final = Address(b"\x03" * 20)
NONCE: Final = b"\x04" * 32
SALT: Final = b"\x05" * 32
START_MS: Final = 1_750_000_000_000
PROMPT: Final = tuple(range(10, 10 + 3 * BLOCK_TOKENS))
TOKENS: Final = 40
EPOCH_S: Final = 3_600

T = TypeVar("T")


def _blank(document: type[T], /, **stated: Any) -> T:
    """A document with what is stated, and zero in every other field."""
    empty = {"B32": ZERO_DIGEST, "Addr": ZERO_ADDRESS, "Bool": False}
    return document(**{name: empty.get(str(hint), 0) for name, hint in document.__annotations__.items()} | stated)


PROFILE: Final = _blank(
    Profile,
    margin_milli=100,
    logprob_micro=20_000,
    projection_micro=30_000,
    flag_ppm=1_000,
    active_parameters=4_000_000,
    total_parameters=4_000_000,
    body_parameters=3_000_000,
    head_parameters=1_000_000,
    layers=4,
    heads=8,
    head_dim=32,
)

SHEET: Final = _blank(
    Tariff,
    provider=WALLET,
    profile_id=Digest(hash_struct(PROFILE)),
    sequence=1,
    prompt_price=1_000,
    cached_price=100,
    completion_price=3_000,
    reasoning_price=3_000,
    standard_bps=BPS,
    privacy_bps=BPS,
    long_context_bps=BPS,
    cache_ttl_s=300,
    base_min_bps=BPS,
    base_max_bps=BPS,
    valid_from=START_MS // 1000 - EPOCH_S,
    valid_until=START_MS // 1000 + 24 * EPOCH_S,
)


@dataclass(frozen=True, slots=True)
class Told:
    """One job as its provider tells it. `expected`: the client's account before the last receipt."""

    dossier: Dossier
    receipts: tuple[WorkReceipt, ...]
    expected: Work
    heads: tuple[Digest, ...]

    @property
    def receipt(self) -> WorkReceipt:
        """The last."""
        return self.receipts[-1]

    @property
    def entry(self) -> Entry:
        """As it is committed to."""
        found = entry_of((digest(DOMAIN, receipt), receipt, True) for receipt in self.receipts)
        assert found is not None
        return found


def _row(index: int) -> Row:
    noise = hashlib.sha256(index.to_bytes(4, "big")).digest()
    return Row(100 + index, noise[:2], bytes(b & 0x3F for b in noise[2:18]))


def tell(account: type[Work], number: int = 0, cached: int = 0) -> Told:
    """A job of TOKENS tokens, accounted for by `account`; everything signed by whom it should be."""
    start_ms = START_MS + 10_000 * number
    request = _blank(
        JobRequest,
        provider=WALLET,
        client=CLIENT.address,
        profile_id=SHEET.profile_id,
        kind=JobKind.GENERATE,
        tier=Tier.STANDARD,
        base_bps=BPS,
        prompt_hash=prompt_hash(SALT, PROMPT),
        prompt_tokens=len(PROMPT),
        max_tokens=TOKENS,
        temperature_micro=800_000,
        top_p_micro=950_000,
        price_ceiling=1 << 80,
        options_hash=options_hash(encode_options(NO_OPTIONS)),
        tariff_hash=digest(DOMAIN, SHEET),
        client_nonce=Digest(number.to_bytes(32, "big")),
        provider_commitment=nonce_commitment(NONCE),
        deadline=start_ms + 600_000,
    )
    job_id = JobId(digest(DOMAIN, request))
    accept = Accept(Digest(job_id), Digest(NONCE), derive_seed(job_id, request.client_nonce, NONCE), start_ms)
    heads = block_heads(SALT, PROMPT)
    begin = (job_id, request, NO_OPTIONS, SHEET, PROFILE, accept, heads)
    ours, theirs = account.start(*begin), Work.start(*begin)
    ours, theirs = ours.hit(cached, kept=True), theirs.hit(cached, kept=True)
    receipts: list[WorkReceipt] = []
    leaves: list[bytes] = []
    expected, now = theirs, start_ms
    for first in range(0, TOKENS, 32):
        now += 1_000
        rows = tuple(_row(index) for index in range(first, min(TOKENS, first + 32)))
        leaves.append(Leaf.of(rows).to_bytes())
        ours, theirs = ours.take(rows, now), theirs.take(rows, now)
        finish, ended = (FinishReason.LENGTH, now) if first + 32 >= TOKENS else (FinishReason.OPEN, 0)
        expected = theirs
        ours, receipt = ours.receipt(finish, ended, Wei(0))
        theirs, _ = theirs.receipt(finish, ended, Wei(0))
        receipts.append(receipt)
        ours, theirs = ours.sealed(digest(DOMAIN, receipt)), theirs.sealed(digest(DOMAIN, receipt))
    dossier = Dossier(
        request,
        CLIENT.sign(DOMAIN, request),
        accept,
        NODE.sign(DOMAIN, accept),
        encode_options(NO_OPTIONS),
        SHEET,
        NODE.sign(DOMAIN, SHEET),
        receipts[-1],
        NODE.sign(DOMAIN, receipts[-1]),
        SALT,
        PROMPT,
        tuple(leaves),
    )
    return Told(dossier, tuple(receipts), expected, heads)


def _client(told: Told) -> str:
    """What the client's own account says of the last receipt, "" for nothing."""
    try:
        check_receipt(DOMAIN, told.expected, told.receipt, told.receipt.finished_at)
    except TallyError as exc:
        return str(exc)
    return ""


def _audit(told: Told) -> str:
    """What examining the dossier says, "" for nothing."""
    try:
        examine(told.dossier, told.entry, DOMAIN, (NODE.address,), PROFILE)
    except Forged as exc:
        return exc.reason
    return ""


def _row_of(jobs: int, client: str = "", proof: str = "", audit: str = "") -> dict[str, Any]:
    return {"jobs": jobs, "client": client, "proof": proof, "audit": audit, "caught": bool(client or proof or audit)}


def _over_count() -> dict[str, Any]:
    told = tell(OverCounting)
    return _row_of(1, _client(told), "", _audit(told))


def _overcharge() -> dict[str, Any]:
    told = tell(Overcharging)
    found = charge_findings(SHEET, told.receipt)
    return _row_of(1, _client(told), found[0].fault.value if found else "", _audit(told))


def _false_cached() -> dict[str, Any]:
    first, second = tell(ForgettingCache), tell(ForgettingCache, 1, cached=2 * BLOCK_TOKENS)
    prefixes, client = Prefixes(), ""
    prefixes.remember(first.receipt)
    try:
        prefixes.check(second.receipt, SHEET, second.heads)
    except TallyError as exc:
        client = str(exc)
    found = hidden_hit(first.receipt, second.receipt, SHEET)
    return _row_of(2, client, found.fault.value if found else "", _audit(second))


def _equivocation() -> dict[str, Any]:
    told = tell(Work)
    other = replace(told.receipt, total=told.receipt.total + 1)
    found = two_receipts(DOMAIN, told.receipt, other)
    both = replace(told, receipts=(*told.receipts[:-1], other))
    return _row_of(1, _client(both), found.fault.value if found else "")


def _omitted() -> dict[str, Any]:
    """The client asks for its job's place in the tree; the entries on either side of where it must be prove the gap."""
    told = [tell(Work, number) for number in range(4)]
    entries = ordered(one.entry for one in told[1:])
    tree, mine = root(entries), told[0].entry
    place = sum(entry.job_id < mine.job_id for entry in entries)
    beside = [index for index in (place - 1, place) if 0 <= index < len(entries)]
    holds = all(verify(entries[index], index, len(entries), prove(entries, index), tree) for index in beside)
    gap = all((entries[index].job_id < mine.job_id) == (index < place) for index in beside)
    return _row_of(1, "no entry of its job under the root", "missing from the root" if holds and gap else "")


def _withheld() -> dict[str, Any]:
    """No member gets the dossier in the whole window: three members, one outcome."""
    gaps = pack_gaps([])
    votes = [Vote(Address(bytes([index]) * 20), AuditOutcome.WITHHELD, 0, 0, 0, gaps) for index in range(1, 4)]
    decision = decide(3, votes, False, Evidence(), PROFILE.flag_ppm)
    return _row_of(1, audit=f"case ends {decision.outcome.name.lower()}, 10 % of the stake")


def _squatter() -> dict[str, Any]:
    """The offer's signatures hold among themselves; the key they recover to is registered to another wallet."""
    offer = _blank(
        Offer,
        provider=WALLET,
        profile_id=SHEET.profile_id,
        tariff_hash=digest(DOMAIN, SHEET),
        model_hash=text_hash("m"),
        region_hash=text_hash("r"),
        verifiability=Verifiability.REPLAY,
    )
    thief = Signer.from_secret(b"\x09" * 32)
    envelope = seal_for_another(DOMAIN, thief, offer, SHEET, b"", peer_id="", addresses=(), model="m", region="r")
    named = Address(unpack(Offer, envelope.offer).provider)
    registered = {NODE.address: WALLET}  # what the Registry says
    caught = named == victim() and registered.get(thief.address) != named
    return _row_of(0, "the node key is not registered to that wallet" if caught else "")


CHEATS: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "over-count": _over_count,
    "false-cached": _false_cached,
    "overcharge": _overcharge,
    "equivocation": _equivocation,
    "omitted-receipt": _omitted,
    "withheld": _withheld,
    "squatter": _squatter,
}


def measure_documents() -> dict[str, Any]:
    """Cheat -> who sees it, and after how many jobs. The honest job is held against the same checks."""
    honest = tell(Work)
    charged = "".join(found.detail for found in charge_findings(SHEET, honest.receipt))
    return {
        "honest": _row_of(1, _client(honest), charged, _audit(honest)),
        **{name: measured() for name, measured in CHEATS.items()},
    }
