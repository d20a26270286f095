"""Grammars that the output follows: JSON objects, JSON Schemas and Lark, by the llguidance library.

Which tokens a grammar allows decides the text, so library version and our own choices are named by `grammar_version`
and hashed into the profile. A grammar allows end tokens where the text so far is complete, and nothing but end
tokens where nothing more can follow; so a grammar needs a model that has one.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from protocol.options import MAX_GRAMMAR_BYTES, JobOptions, Syntax

WHITESPACE: Final = " "
"""Whitespace that may stand between two JSON tokens: one space, as in `{"a": 1, "b": 2}`. Unbounded, as the library
has it, or with room for indentation, a model that likes spaces fills its output with them, and each is paid for.
Changing it needs a new GRAMMAR_RULES (profile.py)."""

COMPILED: Final = 64
"""Compiled grammars that are remembered. Unit: grammars. Tools are called with the same schemas over and over; one
takes up to some megabytes."""

CHECKS_AT_ONCE: Final = 2
"""Checking processes at a time. Unit: processes. Each takes at most CPU_SECONDS; doubling it doubles the cores that
strangers' grammars can occupy beside the model."""

CHECK_TIMEOUT_S: Final = 20.0
"""Wall time for a check, queueing excluded. Unit: seconds. Ten times its CPU limit, for a machine that is full."""

_CHECK: Final = Path(__file__).with_name("grammar_check.py")


class Matcher:
    """Where one stream's text stands in its grammar. Used by one thread at a time."""

    __slots__ = ("_bits", "_control", "_ends", "_matcher", "_vocab")

    def __init__(self, matcher: LLMatcher, vocab: int, control: Sequence[int], ends: Sequence[int]) -> None:
        self._matcher, self._vocab, self._control, self._ends = matcher, vocab, list(control), list(ends)
        self._bits = np.zeros((vocab + 31) // 32, dtype=np.int32)

    @property
    def error(self) -> str:
        """Why it cannot go on, or empty: a limit of the library on how ambiguous a text may be."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[vocab] bool: the tokens that may come next. Meaningless once there is an error."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        mask = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab].astype(bool)
        mask[self._control] = False
        if not self._matcher.is_accepting():
            mask[self._ends] = False
        return mask

    def take(self, token_id: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token_id)

    def follows(self, token_ids: Sequence[int]) -> bool:
        """Take several tokens; False when the grammar does not allow them."""
        return bool(self._matcher.try_consume_tokens(list(token_ids)) == len(token_ids))


class Grammars:
    """Compiles grammars for one model. Used on the event loop; the work happens in another process and in threads."""

    def __init__(self, tokenizer_file: Path, vocab: int, eos_ids: Sequence[int]) -> None:
        self._file, self._vocab, self._eos_ids = tokenizer_file, vocab, list(eos_ids)
        self._tokenizer: LLTokenizer | None = None
        self._control: list[int] = []
        self._loading = asyncio.Lock()
        self._checks = asyncio.Semaphore(CHECKS_AT_ONCE)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    async def matcher(self, options: JobOptions, continued: Sequence[int]) -> Matcher:
        """A matcher for the grammar of `options`, after the output tokens `continued`.

        Raises: ValueError saying what is wrong with the grammar, the tokens or, for grammars, the model.
        """
        if not self._eos_ids:
            raise ValueError("this model has no end token, so output by a grammar could not end")
        source = grammar_source(options)
        tokenizer = await self._library()
        compiled = self._compiled.get(source)
        if compiled is None:
            await self._check(source)
            limits = LLParserLimits(verbose_errors=False)  # verbose ones quote the text
            compiled = await asyncio.to_thread(LLMatcher, tokenizer, source, log_level=0, limits=limits)
            if compiled.is_error():
                _refuse(compiled.get_error())
            self._compiled[source] = compiled
            if len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(source)
        matcher = Matcher(compiled.deep_copy(), self._vocab, self._control, self._eos_ids)
        if not matcher.follows(continued):
            raise ValueError(f"the {len(continued)} tokens that are continued do not follow the grammar")
        return matcher

    async def _library(self) -> LLTokenizer:
        async with self._loading:
            if self._tokenizer is not None:
                return self._tokenizer
            loaded, self._control = await asyncio.to_thread(self._load)
            self._tokenizer = loaded
            return loaded

    def _load(self) -> tuple[LLTokenizer, list[int]]:
        """The library's tokenizer, and the control tokens that are no end tokens."""
        try:
            text, special = unspellable(self._file.read_text(encoding="utf-8"))
            control = [token_id for token_id in special if token_id < self._vocab and token_id not in self._eos_ids]
            return LLTokenizer(text, n_vocab=self._vocab, eos_token=self._eos_ids), control
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"this model's tokenizer cannot follow grammars: {exc}") from exc

    async def _check(self, source: str) -> None:
        """Raises: ValueError when the grammar is wrong or takes more than it may."""
        async with self._checks:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(_CHECK)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                async with asyncio.timeout(CHECK_TIMEOUT_S):
                    out, _ = await process.communicate(source.encode())
            except TimeoutError:
                out = b""
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        if process.returncode == 1:
            _refuse(out.decode(errors="replace"))
        if process.returncode != 0:
            _refuse("it takes too much time or memory to compile; simplify it")


def unspellable(tokenizer_json: str) -> tuple[str, list[int]]:
    """The tokenizer with its control tokens under names that no text spells, and their ids.

    The library writes forced text as its tokenizer would, control tokens included; so it must not know their names.
    Raises: ValueError, KeyError, TypeError, AttributeError when it is no tokenizers file.
    """
    tree = json.loads(tokenizer_json)
    names: dict[str, str] = {}
    special = []
    for token in tree.get("added_tokens", []):
        if token["special"]:
            special.append(int(token["id"]))
            names[token["content"]] = token["content"] = f"\x01control {token['id']}\x01"
    vocab = tree["model"]["vocab"]
    if isinstance(vocab, dict):
        tree["model"]["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:  # unigram: [piece, score] by id
        tree["model"]["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    tree["post_processor"] = None  # names control tokens, and adds them to texts, of which the library has none
    return json.dumps(tree), special


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"the grammar cannot be used: {' '.join(reason.split())[:300]}")


def grammar_source(options: JobOptions) -> str:
    """The grammar as the library takes it. Raises: ValueError for what is no JSON Schema."""
    if len(options.grammar.encode()) > MAX_GRAMMAR_BYTES:
        _refuse(f"it is longer than {MAX_GRAMMAR_BYTES} bytes")
    if options.syntax is Syntax.LARK:
        return str(LLMatcher.grammar_from_lark(options.grammar))
    schema: object = {"type": "object"}
    if options.syntax is Syntax.JSON_SCHEMA:
        try:
            schema = json.loads(options.grammar, parse_constant=_refuse)
        except RecursionError:
            _refuse("it is nested too deep")
        except ValueError as exc:
            _refuse(f"it is no JSON ({exc})")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        _refuse("a JSON Schema is an object")
    # A dict, not the text: the library pastes a text into its own format as it stands.
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))
