"""Text to token ids and back for one model: what the gateway and `tally run` share. No IO.

A chat prompt is rendered by the model's own template, in which every message's content is stood for by an unguessable
mark. Control tokens are looked for in what the template itself wrote, never in the contents, which are put in
last. So no content can open or close a turn, and for contents without control tokens the ids are those that
transformers' `apply_chat_template` would give. A template that inspects contents (to strip earlier reasoning, say)
sees the mark and whatever blanks surround the text, so trimming works and searching finds nothing.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from node.gateway.detokenise import Detokeniser, TextStream
from node.gateway.vocabulary import CardUnusable, load_vocabulary
from node.ports import ModelCard
from protocol.errors import TallyError

MAX_RENDERED_CHARS: Final = 16 << 20
"""Bound on a rendered prompt, contents left out of the count. Unit: characters. A template comes from a stranger's
model card; without a bound one that loops could fill this machine's memory. Doubled, it could fill twice as much."""


class TemplateRefused(TallyError):
    """The model's chat template does not accept these messages; nothing was sent or paid."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `role`: system, user or assistant. `content`: what was said, any text at all."""

    role: str
    content: str


class TextCodec:
    """One model card's text. Safe to use from several threads at once.

    `entropy`: returns that many unguessable bytes. `now`: the time a template may print.
    Raises: CardUnusable when the card's tokenizer or template is broken.
    """

    def __init__(
        self,
        card: ModelCard,
        *,
        entropy: Callable[[int], bytes] = secrets.token_bytes,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._card = card
        self._entropy = entropy
        self._now = now
        self._vocabulary = load_vocabulary(card.tokenizer_json, card.eos_ids, entropy(16).hex())
        self._template = self._compile(card.chat_template) if card.chat_template.strip() else None

    @property
    def model(self) -> str:
        return self._card.model

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows: every one is below this."""
        return self._vocabulary.size

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that only the chat template may place."""
        return self._vocabulary.control_ids

    def encode_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> tuple[int, ...]:
        """Token ids of a conversation, ending where the assistant speaks next.

        Raises: TemplateRefused (the template's own objection, e.g. to a role), CardUnusable (no or broken template).
        """
        if self._template is None:
            raise CardUnusable(
                f"{self.model} has no chat template. Nothing was sent or paid. Use /v1/completions with plain text."
            )
        mark = f"content{self._entropy(16).hex()}x"
        names = self._vocabulary.secret_names
        # Blanks around a content stay visible for templates that trim, unless a control token has blanks of its own.
        cut = str.strip if all(name == name.strip() for name in names) else str
        masked: list[dict[str, str]] = []
        contents: dict[str, str] = {}
        for index, message in enumerate(messages):
            core = cut(message.content)
            before, _, after = message.content.partition(core) if core else (message.content, "", "")
            contents[f"{mark}{index:08d}"] = core
            shown = f"{before}{mark}{index:08d}{after}" if core else message.content
            masked.append({"role": message.role, "content": shown})
        rendered = self._render(masked, add_generation_prompt, mark)

        def placed(match: re.Match[str]) -> str:
            return names.get(match[0]) or contents.get(match[0], "")

        spelled = "|".join((rf"{mark}[0-9]{{8}}", *self._vocabulary.spelled))
        return self._encode(re.sub(spelled, placed, rendered), add_special_tokens=False)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of raw text, with what the tokenizer itself puts around one (a BOS token, usually)."""
        return self._encode(text, add_special_tokens=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens. U+FFFD stands for bytes that are no UTF-8."""
        detokeniser = Detokeniser(self._vocabulary)
        return "".join(detokeniser.push(token_id)[0] for token_id in token_ids) + detokeniser.finish()

    def stream(self, stops: Sequence[str] = ()) -> TextStream:
        """The text of a generation as it comes, cut before the first of `stops`."""
        return TextStream(self._vocabulary, stops)

    def stop_ids(self, stops: Sequence[str]) -> tuple[int, ...]:
        """Ids whose whole text is one of `stops`: with these the provider itself can stop, and sign a final receipt."""
        found = (self._encode(stop, add_special_tokens=False) for stop in stops)
        single = {ids[0] for ids in found if len(ids) == 1}
        return tuple(sorted(number for number in single if self.decode((number,)) in stops))

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # Half a surrogate pair has no UTF-8, so no tokenizer takes it; JSON and command lines can still carry one.
        text = text.encode("utf-8", "replace").decode()
        return tuple(self._vocabulary.encoder.encode(text, add_special_tokens=add_special_tokens).ids)

    def _compile(self, source: str) -> jinja2.Template:
        try:
            return _Environment(self._now).from_string(source)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise CardUnusable(
                f"{self.model}'s chat template does not compile ({exc}). Nothing was sent or paid. "
                "Choose another model, or tell its provider that the template it publishes is broken."
            ) from exc

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool, mark: str) -> str:
        assert self._template is not None
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._card.special,
            ):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise TemplateRefused(
                        f"{self.model}'s chat template wrote more than {MAX_RENDERED_CHARS} characters. "
                        "Nothing was sent or paid. Send fewer messages, or choose another model."
                    )
        except TemplateRefused:
            raise
        except Exception as exc:  # a template is a stranger's program and may raise anything
            reason = re.sub(rf"{mark}\d*", "…", str(exc))[:300]
            raise TemplateRefused(
                f"{self.model}'s chat template refused these messages: {reason}. Nothing was sent or paid. "
                "Most often roles must alternate between user and assistant, or no system message is allowed."
            ) from exc
        return "".join(parts)


class _Generation(Extension):
    """`{% generation %}`, by which some templates mark the assistant's words for training: here it only groups."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, and no large repetitions."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: now().strftime(pattern)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply, but never text or lists by a large number, nor to a large power."""
        sizes = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
        if max(sizes) > 100_000 or (operator == "**" and max(sizes) > 64):
            raise jinja2.TemplateRuntimeError(f"{operator} with an operand above the limit")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
