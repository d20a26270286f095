"""TOPLOC's published comparison, as a yardstick: it commits to activations alone.

Every 32 tokens it keeps the 128 largest entries of the last hidden states in bf16; the verifier computes the states
again, compares exponents and mantissas at its own 128 largest, and refuses at more than 38 exponents that differ, a
mean mantissa error above 10 or a median above 8. Sources: Ong et al., TOPLOC, ICML 2025 (arXiv 2501.16007); thresholds
and comparison of PrimeIntellect-ai/toploc, vllm_validate_poly.py (TEXP 90 equal of 128, TMEAN 10, TMEDIAN 8)
and toploc/poly.py. The polynomial that packs the entries into 258 bytes is left out: at an index it was not built from
it gives an arbitrary number, which is counted here as an exponent that differs. Its further proof over the prompt's
states is left out as well, so a truncated prompt is judged by its output. The thresholds are its authors', found on
models a thousand times larger; on a small one they are loose. The library itself is not used: its wheel does not
import on the torch pinned here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Final

import torch

from devnet.bench.audit_lab import Served
from node.engine.compiled import kernels_for, open_decoder
from node.engine.decoder import Batch, Segment
from node.engine.spec import load_spec
from node.engine.weights import TORCH_DTYPES

TOP_K: Final = 128
CHUNK_TOKENS: Final = 32
MOST_EXPONENTS: Final = 38
MOST_MEAN: Final = 10.0
MOST_MEDIAN: Final = 8.0
PROOF_BYTES: Final = 258
"""Of one chunk as published: modulus and 128 coefficients of two bytes."""

CONTEXT: Final = 1024
"""Longest text that is compared. Unit: tokens. Several times what the benchmark serves."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One chunk: exponents that differ, and mantissa errors where they do not."""

    exponents: int
    mean: float
    median: float

    @property
    def fails(self) -> bool:
        """Whether TOPLOC refuses it."""
        return self.exponents > MOST_EXPONENTS or self.mean > MOST_MEAN or self.median > MOST_MEDIAN


def compare(claimed: torch.Tensor, computed: torch.Tensor) -> Compared:
    """Two chunks of hidden states, [tokens, hidden] each: the prover's and the verifier's."""
    ours, theirs = computed.flatten().to(torch.bfloat16), claimed.flatten().to(torch.bfloat16)
    count = min(TOP_K, ours.numel())
    at = ours.float().abs().topk(count).indices
    known = set(theirs.float().abs().topk(count).indices.tolist())
    bits = [tensor[at].view(torch.int16).int() & 0xFFFF for tensor in (ours, theirs)]
    exponents = [(part >> 7 & 0xFF).tolist() for part in bits]
    mantissas = [(part & 0x7F).tolist() for part in bits]
    errors = [
        abs(a - b)
        for index, e, f, a, b in zip(at.tolist(), *exponents, *mantissas, strict=True)
        if index in known and e == f
    ]
    if not errors:
        return Compared(count, float("inf"), float("inf"))
    return Compared(count - len(errors), mean(errors), median(errors))


class TopLoc:
    """The verifier, under the weights of one directory."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        spec, device = load_spec(model_dir), torch.device("cpu")
        kernels = kernels_for("auto", spec, TORCH_DTYPES[dtype], device, 1, None)
        with torch.inference_mode():
            self._decoder = open_decoder(model_dir, spec, dtype, device, 1, CONTEXT, 0, kernels)

    def refused_at(self, served: Served) -> int:
        """Output tokens until a chunk is refused; 0 when all pass."""
        ids = (*served.request.prompt, *(token.token_id for token in served.tokens[:-1]))
        with torch.inference_mode():
            read = self._decoder.forward(Batch([], [], [], [Segment(0, 0, ids)])).hidden
        computed = read[len(served.request.prompt) - 1 :].float()
        for start in range(0, len(computed), CHUNK_TOKENS):
            end = start + CHUNK_TOKENS
            if compare(served.hidden[start:end], computed[start:end]).fails:
                return min(end, len(computed))
        return 0
