"""Imported sheets: kept whole as they came, replaced whole or not at all; and the commands that show them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from incentives.price_sheets import SheetError
from node.upstream.http import UpstreamError
from node.upstream.sheets import FOLDER, LICENCE_NOTE, import_sheet, load_sheets
from node.upstream.urls import UrlRefused
from tests.node.cli.conftest import Tally, home, tally  # noqa: F401  fixtures
from tests.node.upstream.platforms import FakePlatform, priced

ROWS = [priced("meta/small", "0.0000001", "0.0000004"), priced("router/auto", "-1", "-1")]


async def test_a_sheet_is_kept_as_it_came(tmp_path: Path) -> None:
    async with FakePlatform(ROWS) as platform:
        url = f"{platform.url}/models"
        sheet = await import_sheet(url, tmp_path, 1_800_000_000)
        assert [model.id for model in sheet.models] == ["meta/small"]
        assert [name for name, _ in sheet.skipped] == ["router/auto"]
        assert load_sheets(tmp_path) == [sheet]
        (file,) = (tmp_path / FOLDER).iterdir()
        kept = json.loads(await asyncio.to_thread(file.read_text))
        assert (kept["source"], kept["imported_at"], kept["licence"]) == (url, 1_800_000_000, LICENCE_NOTE)
        assert kept["sheet"] == {"data": ROWS}
        platform.rows = [priced("meta/large", "0.000001", "0.000004")]
        again = await import_sheet(url, tmp_path, 1_800_000_001)
        assert load_sheets(tmp_path) == [again], "a second import from one source replaces the first"
        platform.rows = []
        with pytest.raises(SheetError):
            await import_sheet(url, tmp_path, 1_800_000_002)
        assert load_sheets(tmp_path) == [again], "what is no sheet replaces nothing"


async def test_a_file_and_a_damaged_one(tmp_path: Path) -> None:
    source = tmp_path / "prices.json"
    await asyncio.to_thread(source.write_text, json.dumps({"data": ROWS}))
    sheet = await import_sheet(str(source), tmp_path, 7)
    assert load_sheets(tmp_path) == [sheet] and sheet.source == str(source)
    (file,) = (tmp_path / FOLDER).iterdir()
    await asyncio.to_thread((tmp_path / FOLDER / "other.json").write_text, "{")
    assert load_sheets(tmp_path) == [sheet], "a damaged file takes no other with it"
    await asyncio.to_thread(file.unlink)
    assert load_sheets(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("file:///etc/passwd", SheetError),
        ("ftp://host/models", SheetError),
        ("/nonexistent/prices.json", SheetError),
        ("http://169.254.169.254/latest/meta-data/", UrlRefused),
        ("http://10.0.0.1/models", UrlRefused),
        ("http://127.0.0.1:1/models", UpstreamError),
    ],
)
async def test_what_cannot_be_imported(tmp_path: Path, source: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await import_sheet(source, tmp_path, 7)
    assert load_sheets(tmp_path) == []


class _Sheet(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": ROWS}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    """A platform's address, served beside the command that runs in this thread."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Sheet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/api/v1/models"
        server.shutdown()
        thread.join()


def test_the_command_imports_and_says_what_it_skipped(home: Path, tally: Tally, url: str) -> None:  # noqa: F811
    told = tally("market", "import", url)
    assert told.exit_code == 0, told.output
    assert "1 models" in told.stdout and "router/auto" in told.stdout and "in USD only" in told.stdout
    (sheet,) = load_sheets(home)
    assert sheet.source == url
    answer = json.loads(tally("market", "import", url, "--json").stdout)
    assert answer["models"] == ["meta/small"] and answer["licence"] == LICENCE_NOTE
    refused = tally("market", "import", "http://169.254.169.254/models")
    assert refused.exit_code == 1 and "never dialled" in refused.output and "kept safe" in refused.output


async def test_market_rows_of_a_sheet_are_usd_until_a_rate_is_set(home: Path) -> None:  # noqa: F811
    from node.cli.market import _outside
    from node.cli.market_rows import Wanted
    from node.config import load
    from protocol.units import Tier

    async with FakePlatform([*ROWS, priced("meta/large", "0.000001", "0.000004")]) as platform:
        await import_sheet(f"{platform.url}/models", home, 7)
    flags = {"home": str(home), "exchange.models": "large=meta/large"}
    wanted = Wanted(Tier.STANDARD, 1000, 0, 100)
    plain = _outside(load(flags, env={}), None, wanted)
    assert {(row.model, row.unit) for row in plain} == {("meta/small", "USD"), ("meta/large", "USD")}
    (named,) = _outside(load({**flags, "exchange.tally_usd": "0.5"}, env={}), "large", wanted)
    assert (named.model, named.unit, named.job) == ("meta/large", "TALLY", 1000 * 2 * 10**12 + 100 * 8 * 10**12)
