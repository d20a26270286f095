"""Whole processes: a provider over a real llama_cpp.server, a gateway before it, and a platform outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import AsyncOpenAI

from devnet.cluster import Cluster, ClusterOptions
from tests.node.upstream.llama import Servers
from tests.node.upstream.platforms import FakePlatform, priced

pytestmark = pytest.mark.slow


async def test_an_upstream_provider_and_an_exchange(servers: Servers, tmp_path: Path) -> None:
    url, _ = servers.start()
    async with FakePlatform([priced("far/other", "0.0000001", "0.0000002")]) as platform:
        env = {
            "TALLY_EXCHANGE_ENABLED": "true",
            "TALLY_EXCHANGE_URL": platform.url,
            "TALLY_EXCHANGE_TALLY_USD": "0.5",
            "TALLY_EXCHANGE_CEILING": "1",
        }
        sold = {"upstream": url, "slots": "1"}
        async with Cluster(ClusterOptions(tmp_path / "net", providers=1, provider_config=sold, env=env)) as net:
            client = AsyncOpenAI(base_url=net.url, api_key=net.api_key, max_retries=0)
            (model,) = [model.id for model in (await client.models.list()).data]
            here = await client.chat.completions.with_raw_response.create(
                model=model, messages=[{"role": "user", "content": "Tell me of a lion"}], max_tokens=60, temperature=0
            )
            assert here.headers["x-tally-provider"] == "0x" + net.wallets[0].address.hex()
            answer = here.parse()
            assert answer.usage is not None and answer.usage.model_extra is not None
            assert answer.choices[0].message.content and len(answer.usage.model_extra["tally"]["receipts"]) == 1
            away = await client.chat.completions.with_raw_response.create(
                model="far/other", messages=[{"role": "user", "content": "hi"}], max_tokens=60
            )
            assert away.headers["x-tally-provider"] == "exchange:127.0.0.1"
            assert int(away.headers["x-tally-cost"]) == (11 * 2 + 5 * 4) * 10**11
            assert away.parse().choices[0].message.content == "Hello from outside."
            await client.close()
