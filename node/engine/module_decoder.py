"""Any architecture through its unmodified transformers module: only attention is ours, over the KV slots.

The module is fed a packed batch as one long sequence with explicit positions; transformers lets attention be replaced
by name, and ours writes each row's keys and values into its stream's slot and attends to that slot alone. Before it
serves, the module is proved: chunks, decoding and company must give what its own plain forward gives. One that does
not go through the replaceable attention, is recurrent, or takes positions from elsewhere fails that proof and is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from node.engine.decoder import Batch, DecoderBase, Forward, Segment
from node.engine.kv import KvSlots
from node.engine.module_spec import refused
from node.engine.spec import ModelError, ModelSpec
from node.engine.weights import TORCH_DTYPES

NAME: Final = "tally"
"""What transformers calls our attention."""

PROBE_TOKENS: Final = 24
"""Length of the proof. Unit: tokens. Long enough for three chunks and for decoding; it costs milliseconds."""

PROBE_ERROR: Final = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference of logits in the proof, as a share of their standard deviation: rounding stays below a tenth of
it, a token that sees one key too many or too few is ten times above."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One forward: whose rows these are. `slots`, `positions`: [rows] int64. `windows`: filled in, by layer."""

    kv: KvSlots
    batch: Batch
    slots: torch.Tensor
    positions: torch.Tensor
    windows: dict[int, int]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tally_run: _Run | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query [1, heads, rows, head_dim], key and value [1, kv_heads, rows, head_dim];
    returns [1, rows, heads, head_dim]. Raises: ModelError for what it does not know how to honour."""
    unknown = [name for name in ("s_aux", "position_bias", "alibi", "indices") if others.get(name) is not None]
    if tally_run is None or unknown or attention_mask is not None or dropout:
        raise ModelError(f"its attention wants {', '.join(unknown) or 'masks or arguments'} that slots cannot give")
    run = tally_run
    held = run.kv.layer(module.layer_idx)
    if 2 * key.shape[1] != held.shape[1] or key.shape[3] != held.shape[3] or value.shape != key.shape:
        raise ModelError(f"its layer {module.layer_idx} has keys of another shape than its config says")
    run.windows[module.layer_idx] = sliding_window or 0
    held[run.slots, :, run.positions] = torch.cat((key[0], value[0])).transpose(0, 1)
    kv_heads, count, window = key.shape[1], len(run.batch.slots), sliding_window or 0
    parts = []
    if count:
        length = max(run.batch.positions) + 1
        decoding = held.index_select(0, run.slots[:count])[:, :, :length]
        mask = _visible(run.positions[:count, None], length, window)[:, None]
        rows = query[0, :, :count].transpose(0, 1).unsqueeze(2)  # [streams, heads, 1, head_dim]
        out = _scored(rows, decoding[:, :kv_heads], decoding[:, kv_heads:], mask[:, None, 0], scaling, softcap)
        parts.append(out.squeeze(2))
    row = count
    for part in run.batch.segments:
        n, end = len(part.ids), part.start + len(part.ids)
        prompt = held[part.slot : part.slot + 1, :, :end]
        mask = _visible(run.positions[row : row + n], end, window)
        out = _scored(query[:, :, row : row + n], prompt[:, :kv_heads], prompt[:, kv_heads:], mask, scaling, softcap)
        parts.append(out[0].transpose(0, 1))
        row += n
    return torch.cat(parts).unsqueeze(0), None


def _visible(positions: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """[..., length] bool: not later than each position, and inside its window."""
    columns = torch.arange(length, device=positions.device)
    visible = columns <= positions[..., None]
    return visible & (columns > positions[..., None] - window) if window else visible


def _scored(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """[n, heads, rows, head_dim] over [n, kv_heads, length, head_dim]."""
    if softcap is None:
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scale, enable_gqa=grouped)
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = query @ keys.transpose(-1, -2) * (scale if scale is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(values.dtype) @ values


def _no_mask(*_: Any, **__: Any) -> None:
    """Who sees what is decided in `_attend`."""


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _no_mask)


class ModuleDecoder(DecoderBase):
    """See the module's docstring. Raises: ModelError from the constructor when the proof fails."""

    def __init__(
        self,
        model_dir: Path,
        spec: ModelSpec,
        dtype: str,
        device: torch.device,
        slots: int,
        max_context: int,
        pool_blocks: int = 0,
    ) -> None:
        super().__init__(spec, slots, max_context, pool_blocks, TORCH_DTYPES[dtype], device)
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                model_dir, dtype=self.dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except Exception as exc:  # whatever its loaders raise over a stranger's files
            raise refused(spec.architecture, f"does not load ({exc})") from exc
        if not model._supports_attention_backend:
            raise refused(spec.architecture, "computes attention itself")
        self._model = model.eval().to(device)
        self._head, self._config = model.get_output_embeddings(), model.config
        self._prove(PROBE_ERROR[dtype])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, vocab] fp32, scaled and capped as the architectures that do so do it."""
        logits = self._head(hidden).float()
        logits = logits * float(getattr(self._config, "logit_scale", None) or 1.0)
        logits = logits / float(getattr(self._config, "logits_scaling", None) or 1.0)
        cap = getattr(self._config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, batch: Batch) -> Forward:
        """As Decoder.forward."""
        return self._forward(batch, {})

    def _forward(self, batch: Batch, windows: dict[int, int]) -> Forward:
        packed = self._pack(batch)
        run = _Run(self.kv, batch, packed[1], packed[2], windows)
        out = self._model.base_model(
            input_ids=packed[:1], position_ids=packed[2:], use_cache=False, tally_run=run, attention_mask=None
        )
        return Forward(out.last_hidden_state[0], None)

    def _prove(self, error: float) -> None:
        """Raises: ModelError unless a text in chunks and single tokens, in company, has the plain forward's logits."""
        name, length = self.spec.architecture, min(PROBE_TOKENS, self.max_context)
        ids = torch.randint(self.spec.vocab, (length,), generator=torch.Generator().manual_seed(1)).tolist()
        try:
            with torch.inference_mode():
                self._model.set_attn_implementation("eager")
                given = torch.tensor([ids], device=self.device)
                plain = self._model(input_ids=given, use_cache=False).logits[0].float()
                self._model.set_attn_implementation(NAME)
                ours, windows = self._in_parts(ids)
        except ModelError as exc:
            raise refused(name, str(exc)) from exc
        except Exception as exc:  # a stranger's module may raise anything here
            raise refused(name, f"cannot be fed packed rows ({type(exc).__name__}: {exc})") from exc
        if set(windows) != set(range(self.spec.layers)):
            raise refused(name, f"has replaceable attention in {len(windows)} of {self.spec.layers} layers only")
        told = self._keys_seen(self.spec.window)
        if any(self._keys_seen(window) != told for window in windows.values()):
            raise refused(name, f"has windows that its config does not tell: {sorted(set(windows.values()))} tokens")
        off = float((ours - plain).abs().max() / plain.std())
        if not off <= error:
            raise refused(name, f"does not compute the same in parts as in one piece (off by {off:.2g} deviations)")

    def _keys_seen(self, window: int) -> int:
        """Most keys that a token looks at under a window, 0 being none."""
        return min(window or self.max_context, self.max_context)

    def _in_parts(self, ids: list[int]) -> tuple[torch.Tensor, dict[int, int]]:
        """Logits of every token, read as a chunk, a chunk in company, then one by one; the windows of its layers."""
        first, second, slot = len(ids) // 4, len(ids) // 2, self.slots - 1
        windows: dict[int, int] = {}
        hidden = [self._forward(Batch([], [], [], [Segment(slot, 0, tuple(ids[:first]))]), windows).hidden]
        if self.slots > 1:
            chunks = [Segment(slot, first, tuple(ids[first:second])), Segment(0, 0, tuple(reversed(ids)))]
        else:
            chunks = [Segment(slot, first, tuple(ids[first:second]))]
        hidden.append(self._forward(Batch([], [], [], chunks), windows).hidden[: second - first])
        for at in range(second, len(ids)):
            hidden.append(self._forward(Batch([slot], [ids[at]], [at]), windows).hidden)
        return self.logits(torch.cat(hidden)), windows
