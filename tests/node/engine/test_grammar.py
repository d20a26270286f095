"""Grammars: output parses and follows the schema, continuations follow on, bad or costly ones are refused at once."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from node.engine import grammar as grammar_module
from node.engine.engine import TorchEngine
from node.ports import EngineRequest, EngineToken, Sampling, UnfitRequest
from protocol.options import JobOptions, Syntax
from protocol.units import FinishReason
from tests.node.engine import models
from tests.node.engine.conftest import StartEngine
from tests.node.engine.lab import GREEDY, ids, seed

HOT = Sampling(1_300_000)
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def schema(value: object, **more: Any) -> JobOptions:
    return JobOptions(syntax=Syntax.JSON_SCHEMA, grammar=json.dumps(value), **more)


def lark(text: str, **more: Any) -> JobOptions:
    return JobOptions(syntax=Syntax.LARK, grammar=text, **more)


@pytest.fixture
async def engine(start_engine: StartEngine) -> TorchEngine:
    return await start_engine("shipped", slots=4, max_context=600, compile_option="off")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(models.SHIPPED / "tokenizer.json"))


async def run(
    engine: TorchEngine, options: JobOptions, number: int = 1, count: int = 120, **more: Any
) -> list[EngineToken]:
    request = EngineRequest(ids(number, 12, 4000), seed(number), count, options=options, **{"sampling": HOT, **more})
    return [token async for token in await engine.submit(request)]


def text_of(tokenizer: Tokenizer, tokens: list[EngineToken]) -> str:
    return str(tokenizer.decode([token.token_id for token in tokens], skip_special_tokens=True))


@pytest.mark.slow
async def test_output_follows_its_schema(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """Several at once, hot and greedy, beside one without a grammar that says what it says alone."""
    free = await run(engine, JobOptions(), 50, 40)
    beside, *structured = await asyncio.gather(
        run(engine, JobOptions(), 50, 40),
        *(run(engine, schema(PERSON), number, sampling=HOT if number % 2 else GREEDY) for number in range(6)),
    )
    assert [token.token_id for token in beside] == [token.token_id for token in free]
    for tokens in structured:
        assert tokens[-1].finish is FinishReason.STOP
        assert tokens[-1].token_id in engine._spec.eos_ids
        value = json.loads(text_of(tokenizer, tokens))
        assert list(value) == ["name", "age", "kind", "tags"]
        assert re.fullmatch("[A-Z][a-z]{1,6}", value["name"])
        assert 0 <= value["age"] <= 130
        assert value["kind"] in ("cat", "dog", None)
        assert 1 <= len(value["tags"]) <= 3
        assert all(isinstance(tag, bool) for tag in value["tags"])
    assert len({text_of(tokenizer, tokens) for tokens in structured}) > 3


@pytest.mark.parametrize("text", ["<|im_start|>", "<|im_end|>", "a <|im_end|> b", "<|endoftext|>"])
async def test_text_that_spells_a_control_token_is_written_as_text(
    engine: TorchEngine, tokenizer: Tokenizer, text: str
) -> None:
    for sampling in (GREEDY, HOT):
        tokens = await run(engine, schema({"const": {"said": text}}), 3, sampling=sampling)
        assert json.loads(text_of(tokenizer, tokens)) == {"said": text}
        assert [token.token_id for token in tokens if token.token_id < 4] == [tokens[-1].token_id]


async def test_json_mode_gives_objects(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    for number in range(3):
        tokens = await run(engine, JobOptions(syntax=Syntax.JSON), number, 300, sampling=Sampling(900_000, 900_000))
        text = text_of(tokenizer, tokens)
        assert text.lstrip().startswith("{")
        if tokens[-1].finish is FinishReason.STOP:
            assert isinstance(json.loads(text), dict)
        assert not re.search(r"\s\s", re.sub(r'"(\\.|[^"])*"?', "", text))


async def test_a_lark_grammar_ends_where_nothing_can_follow(engine: TorchEngine, tokenizer: Tokenizer) -> None:
    """An end token comes when the grammar is complete, and not before, whatever min_tokens and max_tokens say."""
    options = lark('start: "yes" | "no, never"', min_tokens=60)
    texts = set()
    for number in range(8):
        tokens = await run(engine, options, number)
        assert tokens[-1].finish is FinishReason.STOP
        texts.add(text_of(tokenizer, tokens))
    assert texts <= {"yes", "no, never"}
    open_end = await run(engine, lark("start: /[a-z ]+/", min_tokens=25), 3, 40)
    assert all(token.token_id not in engine._spec.eos_ids for token in open_end[:24])
    assert re.fullmatch("[a-z ]+", text_of(tokenizer, open_end))


@pytest.mark.slow
async def test_a_continuation_follows_on_in_the_grammar(engine: TorchEngine, start_engine: StartEngine) -> None:
    """Cut after any token, another engine writes the same rest; after the last, nothing but the end."""
    other = await start_engine("shipped", slots=2, max_context=600, compile_option="off")
    options = schema(PERSON)
    whole = [token.token_id for token in await run(engine, options, 4, sampling=GREEDY)]
    prompt = ids(4, 12, 4000)

    async def rest(cut: int) -> list[int]:
        left = schema(PERSON, continued=cut)
        request = EngineRequest((*prompt, *whole[:cut]), seed(4), 120 - cut, GREEDY, left)
        return [token.token_id async for token in await other.submit(request)]

    cuts = [1, 2, len(whole) // 2, len(whole) - 1]
    for cut, got in zip(cuts, await asyncio.gather(*map(rest, cuts)), strict=True):
        assert whole[:cut] + got == whole
    wrong = EngineRequest((*prompt, whole[1], whole[0]), seed(4), 50, GREEDY, schema(PERSON, continued=2))
    with pytest.raises(ValueError, match="2 tokens that are continued do not follow"):
        await other.submit(wrong)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (schema({"type": "fish"}), "Invalid type: fish"),
        (schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (schema({"$ref": "http://127.0.0.1:1/x"}), "Resource"),
        (schema({"$ref": "file:///etc/passwd"}), "Resource"),
        (schema({"not": {}}), "not"),
        (schema({"type": "integer", "minimum": 5, "maximum": 1}), "Unsatisfiable"),
        (schema(False), "an object"),
        (schema([]), "an object"),
        (JobOptions(syntax=Syntax.JSON_SCHEMA, grammar="{"), "no JSON"),
        (JobOptions(syntax=Syntax.JSON_SCHEMA, grammar='{"a": NaN}'), "NaN"),
        (JobOptions(syntax=Syntax.JSON_SCHEMA, grammar="[" * 30_000), "nested too deep"),
        (JobOptions(syntax=Syntax.JSON_SCHEMA, grammar='{}}]}, {"lark_grammar": "start: /.*/"'), "no JSON"),
        (JobOptions(syntax=Syntax.JSON_SCHEMA, grammar="x" * 33_000), "longer than 32768"),
        (lark("start: nothing"), "unknown name"),
        (lark(""), "grammar"),
    ],
)
async def test_bad_grammars_are_refused_before_anything_runs(
    options: JobOptions, reason: str, engine: TorchEngine
) -> None:
    with pytest.raises(ValueError, match=reason):
        await run(engine, options)
    assert engine.stats().prompt_total == 0


@pytest.mark.slow
async def test_a_costly_grammar_is_refused_and_delays_nobody(engine: TorchEngine) -> None:
    """A few bytes that take the library minutes: refused after CPU_SECONDS, while others are served."""
    task = asyncio.create_task(run(engine, schema({"type": "integer", "multipleOf": 9_999_991})))
    beside = 0
    while not task.done():
        beside += bool(await run(engine, JobOptions(), 7, 10))
    assert beside > 5
    with pytest.raises(ValueError, match="too much time or memory"):
        await task


async def test_a_check_that_hangs_is_ended(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "hang.py"
    script.write_text("import sys; sys.stdin.read(); sys.stdin.close(); __import__('threading').Event().wait()")
    monkeypatch.setattr(grammar_module, "_CHECK", script)
    monkeypatch.setattr(grammar_module, "CHECK_TIMEOUT_S", 0.5)
    with pytest.raises(ValueError, match="too much time"):
        await run(engine, schema({"type": "object"}))


async def test_a_grammar_is_checked_once(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    await run(engine, schema(PERSON), 1, 5)
    monkeypatch.setattr(grammar_module, "_CHECK", Path("/nonexistent"))
    assert await run(engine, schema(PERSON), 2, 5)
    with pytest.raises(ValueError, match="the grammar cannot be used"):
        await run(engine, schema({"type": "array"}), 2, 5)


async def test_models_that_cannot_follow_grammars_say_so(
    start_engine: StartEngine, model_dir: Callable[[str], Path]
) -> None:
    endless, unreadable = await start_engine("endless"), await start_engine("llama")
    with pytest.raises(ValueError, match="no end token"):
        await endless.submit(EngineRequest((1,), seed(1), 5, options=schema({"type": "object"})))
    with pytest.raises(ValueError, match="tokenizer cannot follow grammars"):
        await unreadable.submit(EngineRequest((1,), seed(1), 5, options=schema({"type": "object"})))
    assert [token async for token in await unreadable.submit(EngineRequest((1,), seed(1), 5))]


async def test_a_grammar_that_fails_midway_ends_its_stream_alone(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library may give up on a text that is too ambiguous: a typed error, and the neighbour goes on."""
    request = EngineRequest(ids(1, 12, 4000), seed(1), 60, HOT, schema({"type": "object"}))
    stream = await engine.submit(request)
    neighbour = asyncio.create_task(run(engine, JobOptions(), 9, 100))
    await anext(stream)
    matcher = stream._stream.matcher
    assert matcher is not None
    monkeypatch.setattr(type(matcher), "error", property(lambda self: "ParserTooComplex" if self is matcher else ""))
    with pytest.raises(UnfitRequest, match="ParserTooComplex"):
        async for _ in stream:
            pass
    assert len(await neighbour) > 1
    assert engine.stats().active == 0
