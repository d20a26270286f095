"""Prefix-cache evidence: a chain of hashes over a prompt's blocks, which receipts state for the prompt and for the hit.

A block is 32 tokens. With a secret salt of the payer's, head_0 = SHA-256(tag || salt), the digest of block k is
d_k = SHA-256(tag || salt || ids as u32), and head_{k+1} = SHA-256(tag || head_k || d_k). So a head names a whole
prefix: equal heads mean equal prefixes, nobody without the salt can test a guess, and the digests between two heads
prove that one prompt begins with the other without revealing either. A hit is a whole number of blocks and leaves at
least one token to compute, whose logits are needed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Final

from protocol.errors import FieldOutOfRange
from protocol.messages import Tariff, WorkReceipt
from protocol.units import ZERO_DIGEST, Digest

BLOCK_TOKENS: Final = 32
"""Tokens of one cache block. Unit: tokens. Doubling it halves the hashes and loses up to as many tokens of each hit."""

_TAG_START: Final = b"tally/cache/start/1"
_TAG_BLOCK: Final = b"tally/cache/block/1"
_TAG_HEAD: Final = b"tally/cache/head/1"


def block_digests(salt: bytes, token_ids: Sequence[int]) -> tuple[Digest, ...]:
    """Digests of all whole blocks. `salt`: 32 bytes. Raises: FieldOutOfRange."""
    if len(salt) != 32:
        raise FieldOutOfRange("Request", "cache_salt", len(salt))
    whole = len(token_ids) // BLOCK_TOKENS * BLOCK_TOKENS
    blocks = (
        struct.pack(f">{BLOCK_TOKENS}I", *token_ids[start : start + BLOCK_TOKENS])
        for start in range(0, whole, BLOCK_TOKENS)
    )
    return tuple(Digest(hashlib.sha256(_TAG_BLOCK + salt + block).digest()) for block in blocks)


def chain(head: bytes, digests: Sequence[bytes]) -> tuple[Digest, ...]:
    """`head` and every head after it."""
    heads = [Digest(head)]
    for digest in digests:
        heads.append(Digest(hashlib.sha256(_TAG_HEAD + heads[-1] + digest).digest()))
    return tuple(heads)


def block_heads(salt: bytes, token_ids: Sequence[int]) -> tuple[Digest, ...]:
    """Heads of all whole blocks of a prompt: element k names the first k blocks, so there is always element 0.

    `salt`: 32 bytes. Raises: FieldOutOfRange.
    """
    digests = block_digests(salt, token_ids)
    return chain(hashlib.sha256(_TAG_START + salt).digest(), digests)


def hit_limit(prompt_tokens: int) -> int:
    """Most tokens of a prompt that can come from a cache: whole blocks, and the last token is computed."""
    return max(0, prompt_tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def cache_head(heads: Sequence[Digest], cached_tokens: int) -> Digest:
    """What a receipt states for a hit of `cached_tokens`; zero for none.

    Raises: FieldOutOfRange when that is no whole number of the prompt's blocks.
    """
    if cached_tokens == 0:
        return ZERO_DIGEST
    blocks, rest = divmod(cached_tokens, BLOCK_TOKENS)
    if rest or not 0 < blocks < len(heads):
        raise FieldOutOfRange("WorkReceipt", "cached_tokens", cached_tokens)
    return heads[blocks]


def prompt_head(heads: Sequence[Digest]) -> Digest:
    """What a receipt states for all whole blocks of the prompt; zero when it has none, or no salt was given."""
    return heads[-1] if len(heads) > 1 else ZERO_DIGEST


def underreported(kept: WorkReceipt, later: WorkReceipt, tariff: Tariff, between: Sequence[bytes]) -> int:
    """Tokens that `later` prices in full though the provider had promised to hold them; 0 when it is in order.

    `kept` is a final receipt that says its prompt is kept, which the tariff promises for `cache_ttl_s` from its end.
    `between`: digests of the later prompt's blocks after the earlier one's: with them the earlier prompt's head leads
    to the later one's, or nothing is proved. Two receipts and the tariff they name are the whole evidence. A job that
    ended before its first token had no prompt looked up, and no job breaks a promise that it made itself.
    """
    served = later.completion_tokens > 0 and kept.job_id != later.job_id
    same = (kept.provider, kept.client, kept.tariff_hash) == (later.provider, later.client, later.tariff_hash)
    promised = kept.is_kept and kept.is_final and kept.prompt_head != ZERO_DIGEST
    in_time = 0 <= later.received_at - kept.finished_at <= tariff.cache_ttl_s * 1000
    if not (served and same and promised and in_time) or chain(kept.prompt_head, between)[-1] != later.prompt_head:
        return 0
    due = min(kept.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS, hit_limit(later.prompt_tokens))
    return max(0, due - later.cached_tokens)
