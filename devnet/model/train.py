"""Trains the demo model from Debian-packaged text on a processor, in minutes.

Contract: `python -m devnet.model.train --minutes N` leaves a directory that `AutoTokenizer` and `AutoModelForCausalLM`
load offline (bf16 weights, tokenizer, chat template), a file of held-out snippets and a report of bits per byte. The
directory appears whole or not at all: it is written beside the old one and swapped in. The seed fixes tokenizer,
initial weights and the order of the text; the weights that come out also depend on how many steps the machine fits into
the minutes. Training and evaluation use the processor alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from devnet.model import corpus

HERE = Path(__file__).parent
NAME = "tally-demo-4m"

SPECIAL_TOKENS = (corpus.END_OF_TEXT, corpus.IM_START, corpus.IM_END, corpus.PAD)  # ids 0, 1, 2, 3
VOCABULARY = 4096  # a quarter of the parameters is the embedding; doubled, it is half of them
POSITIONS = 2048  # rotary positions that a request may use; the text below was seen at up to LONG_CONTEXT

SHORT_CONTEXT, LONG_CONTEXT = 256, 512
LONG_FROM = 0.7  # share of the time after which the long windows begin: a fifth slower per token
STEP_TOKENS = 3072  # tokens a step; Muon's own work is a tenth to a fifth of it, more if smaller

MUON_RATE, ADAM_RATE = 0.02, 0.004
WARM_UP, FLOOR = 0.03, 0.02  # share of the time; share of the top rate left at the end
GRADIENT_NORM = 1.0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """What a training run did: steps, tokens seen, seconds on the clock and of processor time."""

    steps: int
    tokens: int
    wall_seconds: float
    cpu_seconds: float


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE: every string encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Control tokens are ids here, never text: left in, they would buy merges such as "<|" that nothing else uses.
    control = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer.train_from_iterator((control.sub("", document) for document in documents), trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, <|endoftext|> first."""
    encodings = tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    return [[0, *encoding.ids] for encoding in encodings]


def window_starts(lengths: list[int], context: int) -> list[int]:
    """Where windows of `context` tokens begin in the joined documents.

    A document that the window before cannot hold to its end begins a window of its own (what of it was there already
    comes twice); one longer than a window fills several. So no short document is only ever seen cut in two.
    """
    starts: list[int] = []
    offset = 0
    for length in lengths:
        end = offset + length
        if not starts or end > starts[-1] + context:
            starts.extend(range(offset, end, context))
        offset = end
    return [start for start in starts if start + context + 1 <= offset]


def learning_rate(progress: float) -> float:
    """Share of the top rate: linear warm-up, then a cosine down to the floor, by elapsed time in 0..1."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def build_model() -> LlamaForCausalLM:
    """Exactly 4,000,000 parameters: 1.05 M embedding, tied, and four layers of 0.74 M."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=3,
        )
    )


def build_optimizers(model: LlamaForCausalLM) -> list[Any]:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=MUON_RATE, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(outer, lr=ADAM_RATE, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


class Batches:
    """Windows of the joined documents in random order, each once before any comes again."""

    def __init__(self, documents: list[list[int]], seed: int) -> None:
        self._stream: Ids = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
        lengths = [len(document) for document in documents]
        self._starts = {context: window_starts(lengths, context) for context in (SHORT_CONTEXT, LONG_CONTEXT)}
        self._random = random.Random(seed)
        self._queues: dict[int, list[int]] = {SHORT_CONTEXT: [], LONG_CONTEXT: []}

    def take(self, context: int) -> Any:
        """[STEP_TOKENS // context, context + 1] int64: inputs and, one column later, targets."""
        queue = self._queues[context]
        rows = []
        for _ in range(STEP_TOKENS // context):
            if not queue:
                queue.extend(self._starts[context])
                self._random.shuffle(queue)
            start = queue.pop()
            rows.append(self._stream[start : start + context + 1])
        return torch.from_numpy(np.stack(rows))


def train(model: LlamaForCausalLM, batches: Batches, minutes: float) -> Outcome:
    """Trains until the minutes are over; prints loss, speed and time left about every ten seconds."""
    optimizers = build_optimizers(model)
    top_rates = [MUON_RATE, ADAM_RATE]
    began, cpu_began, budget = time.monotonic(), cpu_seconds(), minutes * 60
    steps, last_print, losses = 0, began, list[float]()
    model.train()
    while (elapsed := time.monotonic() - began) < budget:
        progress = elapsed / budget
        for optimizer, rate in zip(optimizers, top_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(progress)
        batch = batches.take(SHORT_CONTEXT if progress < LONG_FROM else LONG_CONTEXT)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps += 1
        losses.append(float(loss.detach()))
        if (now := time.monotonic()) - last_print >= 10:
            speed = steps * STEP_TOKENS / (now - began)
            mean = sum(losses) / len(losses)
            left = max(0.0, budget - (now - began))
            print(f"step {steps}  loss {mean:.3f}  {speed:.0f} tokens/s  {left / 60:.1f} min left", flush=True)
            last_print, losses = now, []
    return Outcome(steps, steps * STEP_TOKENS, time.monotonic() - began, cpu_seconds() - cpu_began)


def nats(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Negative log likelihood of ids[1:], each half window of LONG_CONTEXT given the half window before it."""
    total, half = 0.0, LONG_CONTEXT // 2
    for start in range(0, len(ids) - 1, half):
        begin = max(0, start - half)
        window = torch.tensor([ids[begin : start + half + 1]])
        logits = model(input_ids=window[:, :-1], use_cache=False).logits[0, start - begin :]
        targets = window[0, start - begin + 1 :]
        total += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return total


def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bits the model needs for each UTF-8 byte of the texts, <|endoftext|> given before each and not counted."""
    with torch.inference_mode():
        total = sum(nats(model, ids) for ids in encode_documents(tokenizer, texts))
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


def evaluate(model: LlamaForCausalLM, tokenizer: Tokenizer, units: list[corpus.Unit]) -> dict[str, float]:
    """Held-out bits per byte for each source and, weighted by bytes, overall."""
    report: dict[str, float] = {}
    bits = size = 0.0
    for source in corpus.HELDOUT_PER_MILLE:
        texts = [unit.text for unit in units if unit.held_out and unit.source == source]
        length = sum(len(text.encode()) for text in texts)
        report[source] = round(bits_per_byte(model, tokenizer, texts), 4)
        bits, size = bits + report[source] * length, size + length
    report["overall"] = round(bits / size, 4)
    return report


def heldout_snippets(units: list[corpus.Unit]) -> list[str]:
    """A few kilobytes of the held-out text, about the same from each source."""
    snippets: list[str] = []
    for source in corpus.HELDOUT_PER_MILLE:
        texts = [unit.text for unit in units if unit.held_out and unit.source == source]
        count, cut = (20, 2000) if source == "wordnet" else (2, 1000)
        snippets += [text[:cut].strip() for text in texts[:: len(texts) // count][:count]]
    return snippets


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The three files AutoTokenizer reads; the chat template is ChatML and trims nothing."""
    names = {
        "eos_token": corpus.IM_END,
        "pad_token": corpus.PAD,
        "additional_special_tokens": [corpus.IM_START, corpus.END_OF_TEXT],
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
        **names,
        "chat_template": CHAT_TEMPLATE,
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n")


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the directory beside `out`, then swaps it in."""
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    model.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # safetensors creates it for the owner alone
    # Qwen's convention: a chat turn ends with <|im_end|>, a plain text with <|endoftext|>; generation stops at either.
    GenerationConfig(bos_token_id=0, eos_token_id=[2, 0], pad_token_id=3).save_pretrained(fresh)
    write_tokenizer(tokenizer, fresh)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from Debian-packaged text.")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time on the clock (default 20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / NAME, help="model directory, replaced whole")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(options.seed)

    units = corpus.gather()
    documents = corpus.training_documents(units, random.Random(options.seed))
    tokenizer, model = train_tokenizer(documents), build_model()
    print(f"{len(documents)} documents, {model.num_parameters()} parameters", flush=True)
    batches = Batches(encode_documents(tokenizer, documents), options.seed)
    del documents  # a gigabyte less beside the training
    outcome = train(model, batches, options.minutes)

    model.eval().to(torch.bfloat16)  # measured as shipped
    write_model(model, tokenizer, options.out)
    snippets = heldout_snippets(units)
    (options.out.parent / "heldout.txt").write_text("\n\f\n".join(snippets) + "\n", encoding="utf-8")
    report = {
        "seed": options.seed,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "wall_minutes": round(outcome.wall_seconds / 60, 1),
        "cpu_minutes": round(outcome.cpu_seconds / 60, 1),
        "bits_per_byte": evaluate(model, tokenizer, units),
        "bits_per_byte_snippets": round(bits_per_byte(model, tokenizer, snippets), 4),
    }
    (options.out.parent / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
