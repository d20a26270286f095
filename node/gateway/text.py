"""Text to token ids and back for one model: what the gateway and `tally run` share. No IO.

A chat prompt is rendered by the model's own template (template.py), in which marks stand for the client's texts, so no
content can open or close a turn; for contents without control tokens the ids are those that transformers'
`apply_chat_template` would give.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import jinja2

from node.gateway.detokenise import Detokeniser, TextStream
from node.gateway.reading import Reader, Reading
from node.gateway.template import ChatTemplate, Marks
from node.gateway.tool_text import ToolForm, form_of
from node.gateway.vocabulary import CardUnusable, load_vocabulary
from node.ports import ModelCard


@dataclass(frozen=True, slots=True)
class PastCall:
    """A function call of an earlier turn. `arguments`: a JSON object, or text that was meant to be one."""

    id: str
    name: str
    arguments: dict[str, Any] | str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `role`: system, user, assistant or tool. `content`: what was said, any text at all.

    `calls`, `reasoning`: an assistant's. `call_id`: the call whose result a tool's message is. `name`: the function's.
    """

    role: str
    content: str
    calls: tuple[PastCall, ...] = ()
    call_id: str = ""
    name: str = ""
    reasoning: str = ""


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

    @property
    def takes_tools(self) -> bool:
        """Whether the chat template has a place for tools."""
        return self._template is not None and self._template.takes_tools

    @property
    def tool_form(self) -> ToolForm | None:
        """How this model writes calls; None when its template takes no tools, or teaches a form not read here."""
        return form_of(self._card.chat_template) if self.takes_tools else None

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, ending where the assistant speaks next. `tools`: OpenAI's tool objects.

        Raises: TemplateRefused (the template's own objection, e.g. to a role), CardUnusable (no or broken template).
        """
        if self._template is None:
            raise CardUnusable(
                f"{self.model} has no chat template. Nothing was sent or paid. Use /v1/completions with plain text."
            )
        names = self._vocabulary.secret_names
        marks = Marks(self._entropy(16).hex(), names)
        values = {
            "messages": [_masked(message, marks) for message in messages],
            "tools": [marks.cover(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._card.special,
        }
        rendered = self._template.render(self.model, values)

        def placed(match: re.Match[str]) -> str:
            return names.get(match[0]) or marks.text(match[0])

        spelled = "|".join((marks.pattern, *self._vocabulary.spelled))
        return self._encode(re.sub(spelled, placed, rendered), add_special_tokens=False)

    def encode_own(self, text: str) -> tuple[int, ...]:
        """Token ids of text of ours, in which control tokens are what they spell."""
        names = self._vocabulary.secret_names
        spelled = "|".join(self._vocabulary.spelled)
        own = re.sub(spelled, lambda match: names.get(match[0], match[0]), text) if spelled else text
        return self._encode(own, add_special_tokens=False)

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

    def reader(self, reading: Reading) -> Reader:
        """A generation taken apart into reasoning, text and calls as it comes."""
        return Reader(self._vocabulary, reading)

    def stop_ids(self, stops: Sequence[str]) -> tuple[int, ...]:
        """Ids whose whole text is one of `stops`: with these the provider itself can stop, and sign a final receipt."""
        found = (self._encode(stop, add_special_tokens=False) for stop in stops)
        single = {ids[0] for ids in found if len(ids) == 1}
        return tuple(sorted(number for number in single if self.decode((number,)) in stops))

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # Half a surrogate pair has no UTF-8, so no tokenizer takes it; JSON and command lines can still carry one.
        text = text.encode("utf-8", "replace").decode()
        return tuple(self._vocabulary.encoder.encode(text, add_special_tokens=add_special_tokens).ids)

    def _compile(self, source: str) -> ChatTemplate:
        try:
            return ChatTemplate(source, self._now)
        except (jinja2.TemplateError, RecursionError) as exc:
            raise CardUnusable(
                f"{self.model}'s chat template does not compile ({exc}). Nothing was sent or paid. "
                "Choose another model, or tell its provider that the template it publishes is broken."
            ) from exc


def _masked(message: ChatMessage, marks: Marks) -> dict[str, Any]:
    """A turn as templates expect one, all its texts marked. Absent parts are left out: templates ask for them."""
    masked: dict[str, Any] = {"role": message.role, "content": marks.mark(message.content)}
    if message.calls:
        masked["tool_calls"] = [
            {
                "id": marks.plain(call.id),
                "type": "function",
                "function": {"name": marks.mark(call.name), "arguments": marks.cover(call.arguments)},
            }
            for call in message.calls
        ]
    if message.call_id:
        masked["tool_call_id"] = marks.plain(message.call_id)
    for key, text in (("name", message.name), ("reasoning_content", message.reasoning)):
        if text:
            masked[key] = marks.mark(text)
    return masked
