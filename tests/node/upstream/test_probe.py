"""What a server can do is believed only when it was seen: every switch of a lying server turns its own claim off."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.upstream.http import UpstreamError
from node.upstream.probe import Abilities
from protocol.units import Verifiability
from tests.node.upstream.helpers import serving
from tests.node.upstream.servers import FakeServer

OTHER_TOKENIZER = Path("devnet/model/tally-demo-4m/tokenizer.json").read_bytes()
CLAIMS = (
    "ids_in",
    "ids_out",
    "raw_logprobs",
    "alternatives",
    "stop_shown",
    "seeds",
    "top_k",
    "min_tokens",
    "json_mode",
    "json_schema",
)


async def shown(**switches: object) -> tuple[Abilities, Verifiability]:
    async with FakeServer(**switches) as server, serving(server) as engine:  # type: ignore[arg-type]
        return engine.abilities, engine.verifiability


def claims(able: Abilities) -> set[str]:
    return {name for name in CLAIMS if getattr(able, name)}


EVERYTHING = set(CLAIMS) - {"json_mode", "json_schema"}


async def test_a_server_that_names_its_tokens_is_offered_as_checkable_by_logprob() -> None:
    able, verifiability = await shown()
    assert claims(able) == EVERYTHING
    assert verifiability is Verifiability.LOGPROB
    assert able.model == "hash-model" and able.max_context == 512 and able.embedding == 0


@pytest.mark.parametrize(
    ("switches", "lost"),
    [
        ({"honours_seed": False}, {"seeds"}),
        ({"honours_top_k": False}, {"top_k"}),
        ({"honours_min_tokens": False}, {"min_tokens"}),
        ({"scales_logprobs": True}, {"raw_logprobs", "alternatives"}),
        ({"shows_stop": False}, {"stop_shown"}),
    ],
)
async def test_what_a_server_ignores_is_not_offered(switches: dict[str, bool], lost: set[str]) -> None:
    able, verifiability = await shown(**switches)
    assert claims(able) == EVERYTHING - lost
    checkable = not lost & {"raw_logprobs", "stop_shown"}
    assert verifiability is (Verifiability.LOGPROB if checkable else Verifiability.NONE)


async def test_a_server_of_text_is_offered_with_nothing_to_check() -> None:
    able, verifiability = await shown(names_tokens=False, shows_stop=False)
    assert verifiability is Verifiability.NONE
    assert claims(able) == {"raw_logprobs", "seeds", "top_k", "min_tokens"}
    assert "logprobs" not in dict(able.fields), "it is not made to compute what nobody can check"


async def test_schemas_are_offered_where_their_answer_came() -> None:
    able, _ = await shown(obeys_schema=True)
    assert able.json_schema and able.json_mode


async def test_a_server_that_puts_bos_before_text_is_noticed() -> None:
    able, _ = await shown(names_tokens=False, adds_bos=True)
    assert able.adds_bos


async def test_the_only_model_is_taken_and_of_several_one_must_be_named() -> None:
    async with FakeServer(models=("one", "two")) as server:
        with pytest.raises(UpstreamError, match="--upstream-model: one, two"):
            async with serving(server):
                raise AssertionError("it started without knowing what it serves")
        async with serving(server, model="two") as engine:
            assert engine.abilities.model == "two"
        with pytest.raises(UpstreamError, match="one, two"):
            async with serving(server, model="three"):
                raise AssertionError("it started with a model that is not there")


@pytest.mark.parametrize("names_tokens", [True, False])
async def test_another_models_tokenizer_is_refused(names_tokens: bool) -> None:
    async with FakeServer(names_tokens=names_tokens) as server:
        with pytest.raises(UpstreamError, match="--model DIR"):
            async with serving(server, tokenizer=OTHER_TOKENIZER, eos=(2,)):
                raise AssertionError("it started with another model's tokenizer")


async def test_a_server_without_completions_is_refused() -> None:
    async with FakeServer(refuses=404) as server:
        with pytest.raises(UpstreamError, match="does not complete"):
            async with serving(server):
                raise AssertionError("it started with nothing to serve")
