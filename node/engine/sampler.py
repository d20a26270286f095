"""The seed-locked sampler of protocol/sampling.py and the fingerprints of protocol/transcript.py, in torch, by batch.

The nucleus needs no sort. Take the argmax of all scores; if that token is outside the nucleus, so is every token with a
logit no larger: drop them all and take the argmax again. A round succeeds with probability top_p at least, or halves
what is left on average, so a handful of rounds end it whatever the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from protocol.sampling import EDGE_LOGIT, EDGE_MASS, MAX_UNIFORM, MICRO, MIX_FIRST, MIX_SECOND, noise_keys
from protocol.transcript import PROJECTION_BYTES, PROJECTION_ROWS, projection_keys

FP16_MAX: Final = 65504.0
FINGERPRINT_BYTES: Final = 2 + PROJECTION_BYTES


def _signed(word: int) -> int:
    """A 32-bit word as int32 holds it."""
    return word - (1 << 32) if word >> 31 else word


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row's token is chosen: the sampling parameters, and the noise words of its position."""

    temperature_micro: int
    top_p_micro: int
    top_k: int
    keys: tuple[int, int]

    @classmethod
    def at(cls, seed: bytes, position: int, temperature_micro: int, top_p_micro: int, top_k: int) -> Draw:
        """For the token at absolute `position`. T = 0 needs no noise."""
        keys = noise_keys(seed, position) if temperature_micro else (0, 0)
        return cls(temperature_micro, top_p_micro, top_k, keys)

    @property
    def cuts(self) -> bool:
        return self.temperature_micro > 0 and (self.top_k > 0 or self.top_p_micro < MICRO)


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 in place on int32, whose products wrap; its right shifts carry the sign, so they are masked."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
    x.mul_(_signed(MIX_FIRST))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))
    x.mul_(_signed(MIX_SECOND))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


class Sampler:
    """Chooses tokens and fingerprints them, for one vocabulary and hidden size, on one device."""

    def __init__(self, vocab: int, hidden: int, device: torch.device) -> None:
        self._vocab, self._hidden, self._device = vocab, hidden, device
        self._ids = torch.arange(vocab, dtype=torch.int32, device=device)
        self._rows = torch.arange(PROJECTION_ROWS, dtype=torch.uint8, device=device)

    def noise(self, keys: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[rows, vocab] fp32 Gumbel values, one row per pair of noise words."""
        words = torch.tensor([[_signed(a), _signed(b)] for a, b in keys], dtype=torch.int32, device=self._device)
        x = _mix_(self._ids ^ words[:, :1])
        _mix_(x.add_(words[:, 1:]))
        v = x.float().mul_(2.0**-32)
        v.add_(x < 0).add_(2.0**-33).clamp_(max=MAX_UNIFORM)
        return v.neg_().log1p_().neg_().log_().neg_()

    def choose(self, logits: torch.Tensor, draws: Sequence[Draw], bias: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, vocab] fp32 -> [rows] int64, as protocol.sampling.choose row by row.

        `bias`, [rows, vocab] fp32, is added to the logits before the rule sees them: penalties, and -inf for a token
        that is forbidden here. At least one token of each row must stay allowed.
        """
        if bias is not None:
            logits = logits + bias
        if not any(draw.temperature_micro for draw in draws):
            return logits.argmax(-1)
        temperature = torch.tensor([[draw.temperature_micro / MICRO] for draw in draws], device=self._device)
        scores = torch.addcmul(logits, self.noise([draw.keys for draw in draws]), temperature)
        chosen = scores.argmax(-1)
        if not any(draw.cuts for draw in draws):
            return chosen
        return self._inside(logits, scores, chosen, temperature, draws)

    def _inside(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        temperature: torch.Tensor,
        draws: Sequence[Draw],
    ) -> torch.Tensor:
        """Redraw the rows whose token is outside the nucleus until none is."""
        top_k, top_p = self._limits(draws)
        mass = torch.softmax(logits / temperature.clamp(min=1 / MICRO), -1)
        while True:
            edge = logits.gather(-1, chosen[:, None])
            above = logits > edge  # [rows, vocab] bool
            count = above.sum(-1)
            outside = (count > 0) & ((count >= top_k) | ((mass * above).sum(-1) >= top_p))
            if not bool(outside.any()):
                return chosen
            scores = scores.masked_fill(outside[:, None] & ~above, -torch.inf)
            chosen = torch.where(outside, scores.argmax(-1), chosen)

    def _limits(self, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
        """top_k and top_p of each row; the vocabulary and 2 where there is no cut."""
        limits = [(d.top_k or self._vocab, d.top_p_micro / MICRO) if d.cuts else (self._vocab, 2.0) for d in draws]
        top_k = torch.tensor([k for k, _ in limits], device=self._device)
        # top_p 1 is no cut, though the mass above a token may round up to 1
        return top_k, torch.tensor([p if p < 1 else 2.0 for _, p in limits], device=self._device)

    def look_back(self, logits: torch.Tensor, chosen: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """[rows, 2] fp32: protocol.sampling.margin of `chosen`, [rows] int64, and best score minus second best.

        `logits`: [rows, vocab] fp32, as the rule reads them: adjusted. The second number knows no cut, so it moves
        as smoothly as the logits do. Rows of which nothing finite is left hold NaN.
        """
        temperature = torch.tensor([[draw.temperature_micro / MICRO] for draw in draws], device=self._device)
        scores = logits
        if any(draw.temperature_micro for draw in draws):
            scores = torch.addcmul(logits, self.noise([draw.keys for draw in draws]), temperature)
        best = scores.topk(2, -1).values
        margins = best[:, 0] - scores.gather(-1, chosen[:, None])[:, 0]
        if any(draw.cuts for draw in draws):
            rows = torch.tensor([i for i, draw in enumerate(draws) if draw.cuts], device=self._device)
            cut = [draw for draw in draws if draw.cuts]
            margins[rows] = self._margins_inside(logits[rows], scores[rows], chosen[rows], temperature[rows], cut)
        return torch.stack((margins, best[:, 0] - best[:, 1]), 1)

    def _margins_inside(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        temperature: torch.Tensor,
        draws: Sequence[Draw],
    ) -> torch.Tensor:
        """[rows] margins of rows with a cut, as protocol.sampling.margin."""
        top_k, top_p = self._limits(draws)
        mass = torch.softmax(logits / temperature, -1)

        def outside(ids: torch.Tensor, lift: float, more: float) -> torch.Tensor:
            above = (logits > logits.gather(-1, ids[:, None]) + lift).scatter_(-1, ids[:, None], False)
            count = above.sum(-1)
            return (count > 0) & ((count >= top_k) | ((mass * above).sum(-1) >= top_p + more))

        ours = scores.gather(-1, chosen[:, None])[:, 0]
        while True:  # rivals by falling score, until one counts; each that does not takes those below it along
            rival = scores.argmax(-1)
            lead = scores.gather(-1, rival[:, None])[:, 0] - ours
            idle = (lead > 0) & outside(rival, -EDGE_LOGIT, -EDGE_MASS)
            if not bool(idle.any()):
                break
            none = idle[:, None] & (logits <= logits.gather(-1, rival[:, None]))
            scores = scores.masked_fill(none, -torch.inf)
        return lead.clamp(min=0).masked_fill(outside(chosen, EDGE_LOGIT, EDGE_MASS), torch.inf)

    def alternatives(self, logits: torch.Tensor, count: int) -> list[tuple[tuple[int, bytes], ...]]:
        """The likeliest tokens of each row, likeliest first and lower ids before equal ones.

        `logits`: [rows, vocab] fp32, unmodified. A pair is a token id and its log-probability, fp16 big-endian.
        """
        values, ids = logits.topk(min(count, self._vocab), -1)
        logprobs = (values - logits.logsumexp(-1, keepdim=True)).clamp_(min=-FP16_MAX)
        raw = logprobs.cpu().numpy().astype(">f2")
        rows = []
        for row, row_values, row_ids in zip(raw, values.tolist(), ids.tolist(), strict=True):
            order = sorted(range(len(row_ids)), key=lambda i: (-row_values[i], row_ids[i]))
            rows.append(tuple((row_ids[i], row[i : i + 1].tobytes()) for i in order))
        return rows

    def projection(self, seed: bytes) -> torch.Tensor:
        """[hidden] uint8: bit k of number i says that row k of the seed's matrix is +1 at i, else -1."""
        first, second = projection_keys(seed)
        x = torch.arange(self._hidden, dtype=torch.int32, device=self._device) ^ _signed(first)
        return (_mix_(_mix_(x).add_(_signed(second))) & 0xFF).to(torch.uint8)

    def logprobs(self, logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """[rows] fp32: log-probability of `chosen`, [rows] int64, under the plain softmax of [rows, vocab] fp32."""
        return (logits.gather(-1, chosen[:, None]) - logits.logsumexp(-1, keepdim=True))[:, 0]

    def fingerprints(
        self, logits: torch.Tensor, hidden: torch.Tensor, chosen: torch.Tensor, projections: torch.Tensor
    ) -> bytes:
        """18 bytes a row: fp16 log-probability under the plain softmax, then the projected hidden state, big-endian.

        `logits` [rows, vocab] fp32, `hidden` [rows, hidden], `chosen` [rows], `projections` [rows, hidden] uint8.
        """
        logprob = logits.gather(-1, chosen[:, None]) - logits.logsumexp(-1, keepdim=True)
        signs = 2.0 * ((projections[:, None] >> self._rows[:, None]) & 1).float() - 1.0  # [rows, 8, hidden]
        projected = torch.bmm(signs, hidden.float().unsqueeze(-1)).squeeze(-1)  # [rows, 8]
        values = torch.cat((logprob, projected / self._hidden**0.5), 1).clamp_(-FP16_MAX, FP16_MAX)
        raw: bytes = values.cpu().numpy().astype(">f2").tobytes()
        return raw
