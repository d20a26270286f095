"""Model cards with small tokenizers trained on the spot, one of each kind that published models use."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from node.ports import ModelCard
from protocol.messages import Profile
from protocol.units import Digest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, how are you today?", "def f(x):\n    return x"]
MARKERS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
UNFLAGGED = ["<think>", "</think>", "<｜User｜>"]
"""Control tokens that their tokenizer does not flag as special, as several published ones do not."""


def profile(**changes: int) -> Profile:
    digests = [name for name, kind in Profile.__annotations__.items() if kind == "B32"]
    values = dict.fromkeys(Profile.__dataclass_fields__, 0) | dict.fromkeys(digests, b"\0" * 32)
    return Profile(**(values | changes))  # type: ignore[arg-type]


@cache
def byte_level_json() -> bytes:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=MARKERS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in UNFLAGGED])
    tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|trim|>", lstrip=True, rstrip=True, normalized=False)])
    return tokenizer.to_str().encode()


@cache
def metaspace_json() -> bytes:
    """As Llama 2 and Mistral: blanks written as a low line, byte fallback, a BOS token put before raw text."""
    vocab: dict[str, int] = {}
    for text in ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]:
        vocab[text] = len(vocab)
    for character in "abcdefghijklmnopqrstuvwxyz<>/s|[]INST_.,":
        vocab.setdefault(character, len(vocab))
    merges = [("▁", "h"), ("h", "e"), ("l", "l"), ("▁", "w"), ("▁", "t"), ("o", "r")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer.to_str().encode()


@cache
def unigram_json() -> bytes:
    """A model that looks whole pieces up: its control tokens are reachable by text unless they are hidden."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("<end>", -1.0), ("▁", -2.0)]
    pieces += [(character, -5.0) for character in "abcdefghijklmnopqrstuvwxyz<>/|_ "]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, normalized=True) for text in ("<unk>", "</s>", "<end>")])
    return tokenizer.to_str().encode()


def card(
    tokenizer_json: bytes | None = None,
    template: str = CHATML,
    *,
    model: str = "tally-test",
    eos: str = "<|im_end|>",
    special: dict[str, str] | None = None,
    max_context: int = 4096,
    reasoning: tuple[str, str] | None = None,
) -> ModelCard:
    """`reasoning`: the tokens that open and close a reasoning block."""
    source = tokenizer_json or byte_level_json()
    tokenizer = Tokenizer.from_str(source.decode())
    eos_id = tokenizer.token_to_id(eos)
    start, end = (tokenizer.token_to_id(marker) for marker in reasoning) if reasoning else (0, 0)
    return ModelCard(
        model=model,
        profile_id=Digest(b"\x11" * 32),
        profile=profile(reasoning_start=start, reasoning_end=end),
        tokenizer_json=source,
        chat_template=template,
        special=special or {"eos_token": eos},
        eos_ids=(eos_id,),
        max_context=max_context,
    )


LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def llama_card() -> ModelCard:
    return card(metaspace_json(), LLAMA, eos="</s>", special={"bos_token": "<s>", "eos_token": "</s>"})


def unigram_card() -> ModelCard:
    template = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    return card(unigram_json(), template, eos="</s>", special={})


def edited(tokenizer_json: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(tokenizer_json), **changes}).encode()
