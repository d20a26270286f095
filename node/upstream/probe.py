"""What a completion server can do, shown by what it does: a request that merely is not refused proves nothing.

Servers ignore fields they do not know. So a seed counts as honoured when the same one repeats a text and another does
not; top_k when 1 makes hot sampling greedy; min_tokens when it holds against a bias that otherwise ends the text at
once; logprobs as those of the plain softmax when temperature leaves them alone; a schema when its one answer comes.
What cannot be shown is not offered. Some thirty requests of at most 32 tokens, once at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from node.upstream.http import Busy, HttpServer, UpstreamError
from node.upstream.reading import Piece, read_chunk
from node.upstream.texts import CONTEXT_IDS, Texts

log = logging.getLogger("tally.upstream")

SAMPLE: Final = "The first book of the history of the world begins with"
"""A prompt that any model goes on from in more than one way."""

SHOWN_TOKENS: Final = 16
"""Length of the texts compared. Unit: tokens. Two hot texts agree by chance on so many in no model; doubling it doubles
the time a start takes on a slow server."""

HOT: Final = 1.5
"""Temperature of the sampled texts: far from greedy, and within every server's bounds (OpenAI's is 2)."""

SAME_LOGPROB: Final = 0.02
"""Largest difference between logprobs that count as the same. Unit: nats. bf16 kernels differ by less between batches;
the temperatures compared would move an unlikely token by more than one."""

OPTIONAL_FIELDS: Final[tuple[tuple[str, tuple[Any, ...]], ...]] = (
    ("top_k", (0, -1)),
    ("min_p", (0.0,)),
    ("repeat_penalty", (1.0,)),
    ("repetition_penalty", (1.0,)),
    ("return_token_ids", (True,)),
    ("return_tokens_as_token_ids", (True,)),
    ("stream_options", ({"include_usage": True},)),
    ("logprobs", (1,)),
)
"""Fields that make a server sample as asked for and nothing else, or say more; each with the values it may know."""

CONTEXT_FIELDS: Final = ("max_model_len", "context_length", "context_window", "max_context_length")
"""Names under which /models states the longest prompt plus output: vLLM, OpenRouter, Groq, LM Studio."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What was shown. `fields`: sent with every request. `top_k_off`: what leaves top_k open, None to leave it out.

    `raw_logprobs`: of the unmodified softmax. `stop_shown`: the token that ends a text is reported like any other.
    `max_context` 0: not said. `embedding`: numbers of a vector, 0 for none; `embed_ids`: it takes token ids.
    """

    model: str
    fields: tuple[tuple[str, Any], ...] = ()
    ids_in: bool = False
    ids_out: bool = False
    adds_bos: bool = False
    logprobs: bool = False
    raw_logprobs: bool = False
    alternatives: bool = False
    stop_shown: bool = False
    seeds: bool = False
    top_k: bool = False
    top_k_off: int | None = None
    min_tokens: bool = False
    json_mode: bool = False
    json_schema: bool = False
    max_context: int = 0
    embedding: int = 0
    embed_ids: bool = False

    @property
    def checkable(self) -> bool:
        """Whether another holder of the model can check each token's logprob: ids and plain logprobs of all of them."""
        return self.ids_in and self.ids_out and self.raw_logprobs and self.stop_shown


async def probe(server: HttpServer, model: str, texts: Texts, eos_ids: Sequence[int], bos_id: int | None) -> Abilities:
    """Find out. `model` "": the only one that the server has.

    Raises: UpstreamError when it cannot be served through: no completions, no or several models, another tokenizer.
    """
    return await _Probe(server, texts, tuple(eos_ids), bos_id).run(model)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A whole answer. `ids`: None unless every piece had them. `tops`: of the first token."""

    text: str
    ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    tops: tuple[tuple[int | str, float], ...]
    finish: str
    prompt_tokens: int | None

    @property
    def content(self) -> tuple[str, tuple[int, ...] | None]:
        return self.text, self.ids


def _joined(pieces: Sequence[Piece]) -> _Answer:
    ids = [piece.ids for piece in pieces]
    whole = [item for item in ids if item is not None]
    logprobs = [piece.logprobs for piece in pieces if piece.ids is None or piece.ids or piece.text]
    known = [item for item in logprobs if item is not None]
    tops = next((piece.tops[0] for piece in pieces if piece.tops), ())
    return _Answer(
        "".join(piece.text for piece in pieces),
        tuple(number for item in whole for number in item) if len(whole) == len(ids) else None,
        tuple(value for item in known for value in item) if len(known) == len(logprobs) else None,
        tops,
        next((piece.finish for piece in reversed(pieces) if piece.finish), ""),
        next((piece.prompt_tokens for piece in pieces if piece.prompt_tokens is not None), None),
    )


class _Probe:
    """One run of the questions; `_has` grows with the answers."""

    def __init__(self, server: HttpServer, texts: Texts, eos_ids: tuple[int, ...], bos_id: int | None) -> None:
        self._server, self._texts, self._eos_ids, self._bos_id = server, texts, eos_ids, bos_id
        self._sample = texts.encode_plain(SAMPLE)
        self._has = Abilities("")

    async def run(self, model: str) -> Abilities:
        self._has = await self._listed(model)
        await self._prompt_form()
        await self._optional_fields()
        greedy = await self._output_form()
        await self._sampling(greedy)
        await self._logprobs()
        await self._endings()
        await self._grammars()
        await self._embeddings()
        return self._without_idle_logprobs()

    # ------------------------------------------------------------------------------------------------------ questions

    async def _listed(self, wanted: str) -> Abilities:
        found = await self._server.get("/models")
        rows = found.get("data") if isinstance(found, dict) else None
        rows = [row for row in rows or () if isinstance(row, dict) and isinstance(row.get("id"), str)]
        names = [row["id"] for row in rows]
        if (wanted and wanted not in names) or (not wanted and len(names) != 1):
            listed = ", ".join(names[:20]) or "none"
            raise UpstreamError(f"name one of the upstream server's models with --upstream-model: {listed}")
        row = rows[names.index(wanted) if wanted else 0]
        stated = [row[name] for name in CONTEXT_FIELDS if type(row.get(name)) is int and row[name] > 0]
        return Abilities(row["id"], max_context=min(stated, default=0))

    async def _prompt_form(self) -> None:
        """Token ids as the prompt, or the same as text."""
        refusal: UpstreamError | None = None
        for ids_in in (True, False):
            self._has = replace(self._has, ids_in=ids_in)
            try:
                await self._ask(max_tokens=1)
                return
            except Busy:
                raise
            except UpstreamError as exc:  # llama_cpp.server answers token ids with HTTP 500
                refusal = exc
        raise UpstreamError("the upstream server does not complete prompts at /completions") from refusal

    async def _optional_fields(self) -> None:
        for name, values in OPTIONAL_FIELDS:
            for value in values:
                before = self._has
                self._has = replace(before, fields=(*before.fields, (name, value)))
                try:
                    await self._ask(max_tokens=1)
                    break
                except Busy:
                    raise
                except UpstreamError:
                    self._has = before
        fields = dict(self._has.fields)
        self._has = replace(self._has, logprobs="logprobs" in fields, top_k_off=fields.get("top_k"))

    async def _output_form(self) -> _Answer:
        """Whether ids come back; and that server and tokenizer agree on what they mean. Raises: UpstreamError."""
        greedy = await self._ask(max_tokens=SHOWN_TOKENS, temperature=0)
        if greedy.ids is not None:
            spelled = self._texts.behind(self._sample[-CONTEXT_IDS:], greedy.ids)
            if max(greedy.ids, default=0) >= self._texts.size or not spelled.startswith(greedy.text):
                raise UpstreamError(
                    "the upstream server's token ids spell another text under the tokenizer in --model DIR: "
                    "give the directory of the model that the server serves"
                )
        counted = greedy.prompt_tokens
        if counted is None:
            counted = await self._counted()
        if (
            counted is not None
            and not self._has.ids_in
            and counted == len(self._sample) + 1
            and self._bos_id is not None
        ):
            self._has = replace(self._has, adds_bos=True)
        elif counted is not None and counted != len(self._sample):
            raise UpstreamError(
                f"the upstream server counts {counted} tokens in a prompt that has {len(self._sample)} under the "
                "tokenizer in --model DIR: give the directory of the model that the server serves"
            )
        self._has = replace(self._has, ids_out=greedy.ids is not None and bool(greedy.ids))
        return greedy

    async def _counted(self) -> int | None:
        """Prompt tokens as a plain answer's usage has them; several servers leave usage out of streams."""
        body = {**self._body({"max_tokens": 1}), "stream": False}
        body.pop("stream_options", None)
        return read_chunk(await self._server.post("/completions", body)).prompt_tokens

    async def _sampling(self, greedy: _Answer) -> None:
        hot = {"max_tokens": SHOWN_TOKENS, "temperature": HOT}
        first = await self._ask(**hot, seed=11)
        again, other = await self._ask(**hot, seed=11), await self._ask(**hot, seed=12)
        seeds = first.content == again.content and first.content != other.content
        top_k = False
        if self._has.top_k_off is not None and first.content != greedy.content:
            top_k = (await self._ask(**hot, seed=11, top_k=1)).content == greedy.content
        self._has = replace(self._has, seeds=seeds, top_k=top_k)

    async def _logprobs(self) -> None:
        if not self._has.logprobs:
            return
        values = []
        for temperature in (0.5, HOT):
            answer = await self._ask(max_tokens=1, temperature=temperature, seed=11, logprobs=2)
            if answer.logprobs is None or len(answer.logprobs) != 1 or len(answer.tops) < 2:
                return
            values.append(answer.tops[:2])
        cold, warm = values
        raw = all(
            name == again and abs(one - two) <= SAME_LOGPROB
            for (name, one), (again, two) in zip(cold, warm, strict=True)
        )
        by_id = all(isinstance(name, int) for name, _ in cold)
        self._has = replace(self._has, raw_logprobs=raw, alternatives=by_id and raw and self._has.ids_out)

    def _without_idle_logprobs(self) -> Abilities:
        """A server that does not name its tokens is not asked for their logprobs: they cannot be checked, and such
        servers sort the whole vocabulary for each (llama_cpp.server: 20 ms a token at 4,096 entries, in Python)."""
        if self._has.ids_out:
            return self._has
        return replace(self._has, fields=tuple(item for item in self._has.fields if item[0] != "logprobs"))

    async def _endings(self) -> None:
        """A bias towards the end of text: is that token shown, and does min_tokens hold against it?"""
        biased = {"max_tokens": 8, "temperature": 0, "logit_bias": {str(number): 100 for number in self._eos_ids[:1]}}
        ended = await self._tried(**biased)
        if ended is None or ended.finish != "stop" or len(self._ids(ended)) > 1:
            return
        shown = ended.ids is not None and ended.ids[-1:] == self._eos_ids[:1] and ended.logprobs is not None
        later = await self._tried(**biased, min_tokens=4)
        holds = later is not None and len([n for n in self._ids(later) if n not in self._eos_ids]) >= 4
        self._has = replace(self._has, stop_shown=shown, min_tokens=holds)

    def _ids(self, answer: _Answer) -> tuple[int, ...]:
        return answer.ids if answer.ids is not None else self._texts.encode_plain(answer.text)

    async def _grammars(self) -> None:
        schema = {
            "type": "object",
            "properties": {"ok": {"type": "boolean", "const": True}},
            "required": ["ok"],
            "additionalProperties": False,
        }
        told = await self._tried(max_tokens=32, temperature=0, response_format=json_schema(schema))
        free = await self._tried(max_tokens=4, temperature=HOT, seed=11, response_format={"type": "json_object"})
        more = await self._tried(max_tokens=4, temperature=HOT, seed=12, response_format={"type": "json_object"})
        begun = [answer is not None and answer.text.lstrip().startswith("{") for answer in (free, more)]
        self._has = replace(self._has, json_schema=_is_ok(told), json_mode=all(begun))

    async def _embeddings(self) -> None:
        for embed_ids in (True, False):
            given = list(self._sample) if embed_ids else self._texts.said(self._sample)
            try:
                found = await self._server.post("/embeddings", {"model": self._has.model, "input": [given]})
                size = len(found["data"][0]["embedding"])
            except (UpstreamError, LookupError, TypeError):
                continue
            self._has = replace(self._has, embedding=size, embed_ids=embed_ids)
            return

    # -------------------------------------------------------------------------------------------------------- asking

    def _body(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        prompt = list(self._sample) if self._has.ids_in else self._texts.said(self._sample)
        return {"model": self._has.model, "prompt": prompt, **dict(self._has.fields), "stream": True, **changes}

    async def _ask(self, **changes: Any) -> _Answer:
        """Raises: UpstreamError and its kinds."""
        events = await self._server.stream("/completions", self._body(changes))
        try:
            return _joined([read_chunk(event) async for event in events])
        finally:
            await events.aclose()

    async def _tried(self, **changes: Any) -> _Answer | None:
        """None where the server refuses or fails. Raises: Busy."""
        try:
            return await self._ask(**changes)
        except Busy:
            raise
        except UpstreamError:
            return None


def _is_ok(answer: _Answer | None) -> bool:
    try:
        return answer is not None and msgspec.json.decode(answer.text) == {"ok": True}
    except (msgspec.DecodeError, UnicodeError):
        return False


def json_schema(schema: object) -> dict[str, Any]:
    """OpenAI's response_format for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
