"""`tally run` over the real gateway and its HTTP, with a marketplace that plays a script."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from node.cli.session import API_KEYS
from node.config import NodeConfig
from node.gateway.auth import ApiKeys
from node.gateway.control import ControlServer
from node.gateway.server import GatewayServer
from node.ports import JobFailed, NoProvider
from node.system import SystemClock, SystemEntropy
from protocol.options import Syntax
from protocol.units import FinishReason
from tests.node.cli.conftest import Tally
from tests.node.gateway import cards
from tests.twins.fake_marketplace import PROVIDER, Fail, FakeMarketplace, Finish, Hold, Say, Step

CARD = cards.card()
TOKENS = Tokenizer.from_str(CARD.tokenizer_json.decode())


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENS.encode(text, add_special_tokens=False).ids)


HELLO = (Say(ids("hello ")), Say(ids("world")), Finish(FinishReason.STOP))
Play = Callable[..., FakeMarketplace]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Make `gateway_app` serve a script; returns the marketplace."""

    def start(*script: Step, offers: bool = True) -> FakeMarketplace:
        market = FakeMarketplace(CARD, script)
        if not offers:
            market.cards = {}
        monkeypatch.setattr("node.app.gateway_app", lambda config: gateway(config, market))
        return market

    return start


@asynccontextmanager
async def gateway(config: NodeConfig, market: FakeMarketplace) -> AsyncIterator[Any]:
    clock, entropy = SystemClock(), SystemEntropy()
    keys = ApiKeys(config.home / API_KEYS, clock=clock, entropy=entropy)
    server = GatewayServer(market, host="127.0.0.1", port=0, api_keys=keys, clock=clock, entropy=entropy)
    url = f"http://127.0.0.1:{await server.start()}/v1"

    async def job(_: dict[str, Any]) -> dict[str, Any]:
        closed = "cancelled" if market.closed else None
        return {"job": {"owed_wei": "160", "closed": closed, "completion_tokens": 32, "receipt": "0x" + "ab" * 32}}

    async def status(_: dict[str, Any]) -> dict[str, Any]:
        return {"role": "client", "url": url}

    control = ControlServer(config.home / "control.sock", {"job": job, "status": status})
    await control.start()

    async def refresh() -> None:
        pass

    try:
        yield SimpleNamespace(
            url=url, client=SimpleNamespace(directory=SimpleNamespace(refresh=refresh)), server=server
        )
    finally:
        await control.stop()
        await server.stop()


def test_text_goes_to_stdout_and_the_bill_to_stderr(tally: Tally, play: Play) -> None:
    market = play(*HELLO)
    result = tally("run", "hi", "--max-tokens", "9", "--temperature", "0", "--tier", "flex", "--system", "be brief")
    assert result.exit_code == 0, result.output
    assert result.stdout == "hello world\n"
    tokens = len(ids("hello ")) + len(ids("world"))
    cost = f"0.{tokens * 5 + 1:018d}".rstrip("0")
    assert f"{tokens} tokens" in result.stderr and f"{cost} TALLY" in result.stderr
    assert "0x" + PROVIDER.hex()[:8] in result.stderr and "receipt 0x" in result.stderr
    (spec,) = market.specs
    assert (spec.max_tokens, spec.sampling.temperature_micro, spec.tier) == (9, 0, 0)
    assert "be brief" in TOKENS.decode(list(spec.prompt), skip_special_tokens=False)


def test_json_has_the_whole_answer(tally: Tally, play: Play) -> None:
    play(*HELLO)
    result = tally("run", "-", "--json", stdin="hi there")
    found = json.loads(result.stdout)
    assert found["text"] == "hello world" and found["finish_reason"] == "stop"
    assert found["provider"] == "0x" + PROVIDER.hex() and found["cost_wei"].isdecimal() and len(found["receipts"]) == 1
    assert result.stderr == ""


def test_a_schema_and_terms_reach_the_job(tally: Tally, play: Play, tmp_path: Path) -> None:
    market = play(*HELLO)
    schema = tmp_path / "city.json"
    schema.write_text('{"type": "object"}')
    reservation = "0x" + "07" * 32
    terms = ("--reservation", reservation, "--private", "--min-tokens", "3", "--max-tokens", "9")
    assert tally("run", "hi", "--json-schema", str(schema), *terms).exit_code == 0
    (spec,) = market.specs
    assert (spec.options.syntax, spec.options.grammar) == (Syntax.JSON_SCHEMA, '{"type":"object"}')
    assert (spec.reservation.hex(), spec.private, spec.options.min_tokens) == ("07" * 32, True, 3)
    schema.write_text("{")
    assert tally("run", "hi", "--json-schema", str(schema)).exit_code == 2


def test_standard_input_raw_and_no_stream(tally: Tally, play: Play) -> None:
    market = play(*HELLO)
    result = tally("run", "--raw", "--no-stream", stdin="the quick")
    assert result.exit_code == 0 and result.stdout == "hello world\n"
    assert market.specs[0].prompt == ids("the quick")


def test_its_key_is_made_once_and_again_when_revoked(tally: Tally, play: Play, home: Path) -> None:
    play(*HELLO)
    assert tally("run", "a").exit_code == tally("run", "b").exit_code == 0
    assert [key["name"] for key in json.loads(tally("gateway", "key", "list", "--json").stdout)] == ["tally-run"]
    assert (home / "tally-run.key").stat().st_mode & 0o777 == 0o600
    tally("gateway", "key", "revoke", "tally-run")
    assert tally("run", "c").exit_code == 0


@pytest.mark.parametrize(
    ("script", "shown", "said"),
    [
        ((Fail(NoProvider("all are busy")),), "", "all are busy"),
        ((Say(ids("hello ")), Fail(JobFailed("the provider died"))), "hello", "the provider died"),
        ((Say(ids("hello ")), Finish(FinishReason.ESCROW_EXHAUSTED)), "hello", "escrow"),
    ],
)
def test_a_failure_keeps_what_came_and_exits_1(
    tally: Tally, play: Play, script: tuple[Step, ...], shown: str, said: str
) -> None:
    play(*script)
    result = tally("run", "hi")
    assert result.exit_code == 1
    assert result.stdout.strip() == shown and said in result.stderr


def test_without_an_offer_it_says_what_to_do(tally: Tally, play: Play) -> None:
    play(offers=False)
    result = tally("run", "hi")
    assert result.exit_code == 1 and "--bootstrap" in result.stderr


def test_two_models_need_a_choice(tally: Tally, play: Play) -> None:
    market = play(*HELLO)
    market.cards["other"] = cards.card(model="other")
    result = tally("run", "hi")
    assert result.exit_code == 2 and "other, tally-test" in result.stderr
    assert tally("run", "hi", "--model", "tally-test").exit_code == 0


def test_ctrl_c_pays_for_what_came_and_says_so(tally: Tally, play: Play) -> None:
    hold = Hold()
    market = play(Say(ids("hello ")), hold)

    def interrupt() -> None:
        while not hold.reached.is_set():
            threading.Event().wait(0.02)
        threading.Event().wait(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    result = tally("run", "hi")
    assert result.exit_code == 130
    assert market.closed == 1
    assert "32 were receipted and cost 0.00000000000000016 TALLY" in result.stderr
    assert "receipt 0xabababab" in result.stderr and result.stdout.strip() == "hello"


@pytest.fixture
def running(home: Path) -> Iterator[FakeMarketplace]:
    """A gateway that runs in this home already, in a thread of its own."""
    market = FakeMarketplace(CARD, HELLO)
    ready, stop = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        from node import config

        loops.append(asyncio.get_running_loop())
        async with gateway(config.load({"home": home}), market):
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(20)
    yield market
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(20)


def test_a_gateway_that_runs_here_is_used(tally: Tally, running: FakeMarketplace) -> None:
    result = tally("run", "hi")
    assert result.exit_code == 0 and result.stdout == "hello world\n", result.output
    assert len(running.specs) == 1
    assert tally("run", "hi", "--max-price", "0.01").exit_code == 0
    assert running.specs[-1].price_ceiling == 10**16
    wrong = tally("run", "hi", "--max-price", "much")
    assert wrong.exit_code == 1 and "'much' is no decimal number" in wrong.stderr and len(running.specs) == 2


def test_what_to_do_next_fits_what_went_wrong(tally: Tally, play: Play) -> None:
    play(*HELLO)
    stranger = tally("run", "hi", "--model", "nobody-sells-it").stderr
    assert "tally market" in stranger and ". Nothing was sent" in stranger
    wrong = tally("run", "hi", "--max-tokens", "5", "--min-tokens", "9").stderr
    assert "min_tokens" in wrong and "tally market" not in wrong


@pytest.mark.parametrize("prompt", [[], [""], ["-"]])
def test_an_empty_prompt_is_wrong_usage(tally: Tally, prompt: list[str]) -> None:
    result = tally("run", *prompt, stdin="")
    assert result.exit_code == 2 and "empty" in result.stderr
