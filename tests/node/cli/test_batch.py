"""`tally batch`: lines checked before anything is spent, stopped and killed at any point, and continued."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.cli.batchbook import Book
from node.cli.batchfile import BatchFile, read_batch
from node.cli.batchrun import Batch, Reply
from node.cli.failures import CommandFailed
from protocol.units import JobKind, Tier, Wei
from tests.node.cli.conftest import Tally
from tests.node.cli.test_run import HELLO, Play, ids, play
from tests.twins.fake_marketplace import Embed, Finish, Hold, Say

__all__ = ["play"]

CHAT = {"model": "tally-test", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 10}


def line(custom_id: str, **changes: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": CHAT} | changes


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" if not isinstance(item, str) else item + "\n" for item in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- through the gateway


def test_lines_become_batch_jobs_and_openais_output(tally: Tally, play: Play, tmp_path: Path) -> None:
    market = play(*HELLO)
    text = {"model": "tally-test", "prompt": "the quick", "max_tokens": 10, "service_tier": "priority"}
    file = write(tmp_path / "in.jsonl", line("a"), line("b", url="/v1/completions", body=text))
    result = tally("batch", str(file), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    answers = {entry["custom_id"]: entry for entry in read(tmp_path / "in.out.jsonl")}
    assert answers["a"]["response"]["status_code"] == 200 and answers["a"]["error"] is None
    assert answers["a"]["response"]["body"]["choices"][0]["message"]["content"] == "hello world"
    assert answers["b"]["response"]["body"]["choices"][0]["text"] == "hello world"
    assert {(spec.kind, spec.tier) for spec in market.specs} == {(JobKind.BATCH, Tier.FLEX)}
    assert (found["done"], found["failed"], found["left"], found["invalid"]) == (2, 0, 0, 0)
    costs = [int(entry["response"]["body"]["usage"]["tally"]["cost_wei"]) for entry in answers.values()]
    assert int(found["cost_wei"]) == sum(costs) > 0
    assert found["completion_tokens"] == 2 * len(ids("hello ") + ids("world"))
    assert not (tmp_path / "in.errors.jsonl").exists()


def test_embeddings_are_bought_at_the_flex_tier(tally: Tally, play: Play, tmp_path: Path) -> None:
    market = play(Embed(), Finish())
    body = {"model": "tally-test", "input": ["one", "two"]}
    file = write(tmp_path / "in.jsonl", line("a", url="/v1/embeddings", body=body))
    assert tally("batch", str(file)).exit_code == 0
    assert len(read(tmp_path / "in.out.jsonl")[0]["response"]["body"]["data"]) == 2
    assert [(spec.kind, spec.tier) for spec in market.specs] == [(JobKind.EMBED, Tier.FLEX)]


def test_a_second_run_asks_for_nothing_that_is_finished(tally: Tally, play: Play, tmp_path: Path) -> None:
    market = play(*HELLO)
    file = write(tmp_path / "in.jsonl", line("a"), line("b"))
    assert tally("batch", str(file)).exit_code == 0
    before = (tmp_path / "in.out.jsonl").read_bytes()
    again = tally("batch", str(file), "--json")
    assert again.exit_code == 0 and len(market.specs) == 2
    assert (tmp_path / "in.out.jsonl").read_bytes() == before
    found = json.loads(again.stdout)
    assert (found["done"], found["skipped"]) == (2, 2) and int(found["cost_wei"]) > 0


def test_wrong_lines_are_listed_with_their_numbers_and_the_rest_is_run(
    tally: Tally, play: Play, tmp_path: Path
) -> None:
    market = play(*HELLO)
    file = write(
        tmp_path / "in.jsonl",
        line("good"),
        "no json",
        [1],
        line("", body=CHAT),
        line("good"),
        line("m", method="GET"),
        line("u", url="/v1/responses"),
        line("s", body={**CHAT, "stream": True}),
        line("t", body={**CHAT, "temperature": 9}),
        "",
        line("x", body={**CHAT, "x_tally": 3}),
    )
    result = tally("batch", str(file))
    assert result.exit_code == 1 and "line 9: temperature must be" in result.stderr
    errors = {entry["error"]["line"]: entry["error"]["code"] for entry in read(tmp_path / "in.errors.jsonl")}
    assert errors == {
        2: "invalid_json_line",
        3: "invalid_json_line",
        4: "missing_custom_id",
        5: "duplicate_custom_id",
        6: "invalid_method",
        7: "invalid_url",
        8: "invalid_request",
        9: "invalid_value",
        11: "invalid_value",
    }
    assert len(market.specs) == 1
    assert tally("batch", str(file)).exit_code == 1 and len(read(tmp_path / "in.errors.jsonl")) == 9


def test_a_dry_run_prices_the_worst_case_and_writes_nothing(tally: Tally, play: Play, tmp_path: Path) -> None:
    market = play(*HELLO)
    file = write(tmp_path / "in.jsonl", line("a"), line("b"))
    found = json.loads(tally("batch", str(file), "--dry-run", "--json").stdout)
    assert found["lines"] == 2 and found["unpriced"] == 0
    assert int(found["least_wei"]) == int(found["most_wei"]) > 2 * 50
    assert market.specs == [] and sorted(path.name for path in tmp_path.glob("in*")) == ["in.jsonl"]


def test_a_dry_run_names_the_lines_that_would_be_refused_and_prices_the_rest(
    tally: Tally, play: Play, tmp_path: Path
) -> None:
    play(*HELLO)
    stranger = line("b", body=CHAT | {"model": "nobody-sells-it"})
    file = write(tmp_path / "in.jsonl", line("a"), stranger, line("c"))
    result = tally("batch", str(file), "--dry-run", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and [refused["line"] for refused in found["refused"]] == [2]
    assert int(found["least_wei"]) > 2 * 50
    text = tally("batch", str(file), "--dry-run").stdout
    assert "line 2: The model 'nobody-sells-it'" in text and "2 valid lines, 1 invalid" in text


def test_a_summary_names_only_files_that_are_there(tally: Tally, play: Play, tmp_path: Path) -> None:
    play(*HELLO)
    nothing = tally("batch", str(write(tmp_path / "none.jsonl"))).stdout
    assert "0 of 0 lines answered" in nothing and "answers in" not in nothing and "errors in" not in nothing
    bad = write(tmp_path / "bad.jsonl", line("a"), line("b", body=CHAT | {"model": "nobody-sells-it"}))
    tally("batch", str(bad))
    again = tally("batch", str(bad)).stdout
    assert "1 of 2 lines answered, 1 failed, 0 left, 0 invalid; 2 were finished before this run" in again
    assert "answers in" in again and "errors in" in again


def test_the_budget_holds_for_all_runs_together(tally: Tally, play: Play, tmp_path: Path) -> None:
    market = play(*HELLO)
    file = write(tmp_path / "in.jsonl", *(line(str(number)) for number in range(20)))
    worst = int(json.loads(tally("batch", str(file), "--dry-run", "--json").stdout)["most_wei"]) // 20
    budget = f"0.{3 * worst:018d}"
    first = json.loads(tally("batch", str(file), "--max-cost", budget, "--json").stdout)
    assert 0 < first["done"] < 20 and first["left"] == 20 - first["done"] and "--max-cost" in first["why_left"]
    assert int(first["cost_wei"]) <= 3 * worst
    assert all(spec.price_ceiling is not None and spec.price_ceiling <= worst for spec in market.specs)
    second = tally("batch", str(file), "--max-cost", budget, "--json")
    assert second.exit_code == 1 and json.loads(second.stdout)["done"] == first["done"]
    assert json.loads(tally("batch", str(file), "--json").stdout)["done"] == 20


def test_another_input_does_not_continue_a_batch(tally: Tally, play: Play, tmp_path: Path) -> None:
    play(*HELLO)
    file = write(tmp_path / "in.jsonl", line("a"))
    assert tally("batch", str(file)).exit_code == 0
    write(file, line("a"), line("b"))
    result = tally("batch", str(file))
    assert result.exit_code == 1 and "belongs to another input" in result.stderr
    assert tally("batch", str(file), "--output", str(tmp_path / "other.jsonl")).exit_code == 0


def test_lost_answers_are_not_bought_again_unasked(tally: Tally, play: Play, tmp_path: Path) -> None:
    market = play(*HELLO)
    file = write(tmp_path / "in.jsonl", line("a"))
    tally("batch", str(file))
    (tmp_path / "in.out.jsonl").unlink()
    result = tally("batch", str(file))
    assert result.exit_code == 1 and "state file to buy them again" in result.stderr and len(market.specs) == 1


def test_ctrl_c_finishes_what_runs_and_the_next_run_goes_on(tally: Tally, play: Play, tmp_path: Path) -> None:
    hold = Hold()
    market = play(Say(ids("hello ")), hold, Say(ids("world")), Finish())
    file = write(tmp_path / "in.jsonl", *(line(str(number)) for number in range(3)))

    def interrupt() -> None:
        while not hold.reached.is_set():
            threading.Event().wait(0.02)
        hold.go.set()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    result = tally("batch", str(file), "--concurrency", "1")
    assert result.exit_code == 130, result.output
    assert "1 of 3 lines answered" in result.stdout and "2 left" in result.stdout
    assert [entry["custom_id"] for entry in read(tmp_path / "in.out.jsonl")] == ["0"] and market.closed == 0
    assert tally("batch", str(file)).exit_code == 0 and len(market.specs) == 3


def test_files_must_differ(tally: Tally, tmp_path: Path) -> None:
    file = write(tmp_path / "in.jsonl", line("a"))
    assert tally("batch", str(file), "--output", str(file)).exit_code == 2
    assert read(file)


# --------------------------------------------------------------------------------------------------------- the runner


class Killed(BaseException):
    """The process ends here, as by kill -9: nothing after it runs."""


OK = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "tally": {"cost_wei": "5"}}}


class Gateway:
    """Answers by a script per custom id: a Reply, or an exception. Counts what was bought."""

    def __init__(self, script: Callable[[str, int], Reply] | None = None) -> None:
        self.script = script or (lambda _name, _try: Reply(200, OK))
        self.bought: list[str] = []
        self.keys: list[str] = []
        self.asked: dict[str, int] = {}

    async def send(self, _url: str, body: dict[str, Any], key: str) -> Reply:
        if body["x_tally"].get("dry_run"):
            return Reply(200, {"least_wei": "10", "most_wei": "20"})
        name = body["user"]
        number = self.asked[name] = self.asked.get(name, 0) + 1
        self.keys.append(key)
        await asyncio.sleep(0)
        reply = self.script(name, number)
        if reply.status == 200:
            self.bought.append(name)
        return reply


def batch_of(folder: Path, count: int) -> BatchFile:
    lines = [line(str(number), body={**CHAT, "user": str(number)}) for number in range(count)]
    return read_batch(write(folder / "in.jsonl", *lines))


async def run(
    batch: BatchFile,
    folder: Path,
    gateway: Gateway,
    *,
    concurrency: int = 3,
    most: int | None = None,
    pauses: list[float] | None = None,
) -> tuple[Book, Batch]:
    async def pause(seconds: float) -> None:
        if pauses is not None:
            pauses.append(seconds)

    with Book(batch, folder / "out.jsonl", folder / "errors.jsonl") as book:
        runner = Batch(
            batch,
            book,
            gateway.send,
            concurrency=concurrency,
            most=None if most is None else Wei(most),
            pause=pause,
        )
        await runner.run()
    return book, runner


def failing(status: int, code: str, **options: Any) -> Reply:
    return Reply(status, {"error": {"code": code, "message": code}}, **options)


async def test_busy_lines_are_tried_again_and_then_left_for_the_next_run(tmp_path: Path) -> None:
    batch, pauses = batch_of(tmp_path, 2), []
    busy = failing(429, "provider_busy", retry_after_s=2.0)
    patient = Gateway(lambda name, number: busy if name == "0" or number < 3 else Reply(200, OK))
    book, runner = await run(batch, tmp_path, patient, pauses=pauses)
    assert patient.bought == ["1"] and patient.asked == {"0": 8, "1": 3}
    assert [left.custom_id for left in runner.waiting] == ["0"] and max(pauses) <= 60 and 8.0 in pauses
    assert [entry["custom_id"] for entry in read(tmp_path / "errors.jsonl")] == ["0"]
    book, runner = await run(batch, tmp_path, Gateway())
    assert runner.waiting == [] and book.totals.done == 2 and book.totals.cost == 10
    assert read(tmp_path / "errors.jsonl") == []


async def test_what_is_wrong_for_good_is_not_asked_again(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, 3)
    first = Gateway(lambda name, _: failing(400, "bad_request") if name == "1" else Reply(200, OK))
    book, runner = await run(batch, tmp_path, first)
    assert first.asked["1"] == 1 and (book.totals.done, book.totals.failed, runner.waiting) == (2, 1, [])
    second = Gateway()
    book, _ = await run(batch, tmp_path, second)
    assert second.asked == {} and book.totals.failed == 1 and len(read(tmp_path / "errors.jsonl")) == 1


async def test_an_empty_wallet_stops_the_batch(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, 10)
    poor = Gateway(lambda _name, _try: failing(402, "insufficient_funds"))
    _, runner = await run(batch, tmp_path, poor, concurrency=2)
    assert sum(poor.asked.values()) <= 3 and len(runner.waiting) == 10 and runner.why == "insufficient_funds"


async def test_a_paid_failure_is_not_tried_again_by_itself(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, 1)
    error = {"code": "job_failed", "message": "died", "tally": {"cost_wei": "3"}}
    gateway = Gateway(lambda _name, _try: Reply(503, {"error": error}, retry=False))
    book, runner = await run(batch, tmp_path, gateway)
    assert gateway.asked == {"0": 1} and book.totals.cost == 3 and len(runner.waiting) == 1


async def test_stopping_finishes_what_runs_and_takes_no_more(tmp_path: Path) -> None:
    batch, gateway = batch_of(tmp_path, 10), Gateway()
    with Book(batch, tmp_path / "out.jsonl", tmp_path / "errors.jsonl") as book:
        runner = Batch(batch, book, gateway.send, concurrency=2, most=None, on_change=lambda: runner.stop("asked to"))
        await runner.run()
    assert 1 <= len(gateway.bought) <= 2 and len(read(tmp_path / "out.jsonl")) == len(gateway.bought)


async def test_a_budget_is_never_overspent_by_lines_that_run_at_once(tmp_path: Path) -> None:
    batch, gateway = batch_of(tmp_path, 10), Gateway()
    book, runner = await run(batch, tmp_path, gateway, concurrency=8, most=42)
    # 5 wei each, 20 at worst: a line is sent as long as its cheapest worst case of 10 fits what is left.
    assert book.totals.cost == 35 and len(runner.waiting) == 3 and "000007 TALLY is left" in runner.why


async def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, 1)
    with Book(batch, tmp_path / "out.jsonl", tmp_path / "errors.jsonl"):
        with pytest.raises(CommandFailed, match="another run"):
            Book(batch, tmp_path / "out.jsonl", tmp_path / "errors.jsonl").__enter__()


async def test_a_key_that_a_killed_run_used_up_is_replaced(tmp_path: Path) -> None:
    batch = batch_of(tmp_path, 1)
    gateway = Gateway(lambda _name, number: failing(409, "job_cancelled") if number == 1 else Reply(200, OK))
    book, _ = await run(batch, tmp_path, gateway)
    assert book.totals.done == 1 and len(set(gateway.keys)) == 2


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from(["out.jsonl", "out.jsonl.state", "errors.jsonl"]),
    st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_killed_at_any_write_nothing_is_lost_and_only_running_lines_are_asked_twice(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], concurrency: int, torn: str, cut: int
) -> None:
    """Each run is killed at its n-th write, before or after it reached the disk; then one file loses its last bytes."""
    folder = tmp_path_factory.mktemp("batch")
    batch, gateway = batch_of(folder, 6), Gateway(_some_fail)
    running_when_killed = 0
    for kill in kills:
        running_when_killed += asyncio.run(_killed_run(batch, folder, gateway, concurrency, kill))
        _tear(folder / torn, cut)
    asyncio.run(run(batch, folder, gateway, concurrency=concurrency))
    book, runner = asyncio.run(run(batch, folder, Gateway(_some_fail)))
    answers = [entry["custom_id"] for entry in read(folder / "out.jsonl")]
    assert sorted(answers) == ["0", "1", "2", "4", "5"] and runner.waiting == []
    assert [entry["custom_id"] for entry in read(folder / "errors.jsonl")] == ["3"]
    twice = len(gateway.bought) - len(set(gateway.bought))
    assert twice <= running_when_killed
    assert book.totals.done == 5 and book.totals.failed == 1


def _some_fail(name: str, _number: int) -> Reply:
    return failing(400, "bad_request") if name == "3" else Reply(200, OK)


async def _killed_run(batch: BatchFile, folder: Path, gateway: Gateway, concurrency: int, kill: int) -> int:
    """A run that ends at its `kill`-th write, half of them before the write; returns how many lines ran then."""
    book = Book(batch, folder / "out.jsonl", folder / "errors.jsonl")
    writes = 0
    append = book._append

    def dying(path: Path, entry: dict[str, Any]) -> None:
        nonlocal writes
        writes += 1
        if writes * 2 == kill:
            raise Killed
        append(path, entry)
        if writes * 2 + 1 == kill:
            raise Killed

    book._append = dying  # type: ignore[method-assign]
    runner = None
    try:
        with book:
            runner = Batch(batch, book, gateway.send, concurrency=concurrency, most=None)
            await runner.run()
    except Killed:
        return concurrency
    return 0


def _tear(path: Path, cut: int) -> None:
    """Leave the beginning of a line that was being written: no more can be torn, since each line is synced."""
    if path.exists():
        with path.open("ab") as file:
            file.write(b'{"custom_id": "0", "response": {"body": {}}'[:cut])
