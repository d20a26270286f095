"""A whole market on this machine: Anvil, the contracts, providers and a gateway, each a process of its own.

Everything listens on loopback and lies in one directory; leaving the context stops every process in order: gateway
(its last jobs are cancelled and paid), providers (they settle), chain.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from devnet.anvil import Anvil, AnvilOptions
from devnet.deploy import DeployOptions, deploy, fund
from devnet.processes import NodeProcess, free_port
from node.chain.deployment import Deployment
from node.keys import load_or_create
from node.system import SystemClock
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Wei

MODEL_DIR: Final = Path(__file__).parent / "model" / "tally-demo-4m"
MODEL_NAME: Final = "tally-demo-4m"

SCRYPT_N: Final = 8192
"""Work factor of the devnet's key files, which guard test money: 0.06 s an unlock instead of 1.7 s."""

EPOCH_SECONDS: Final = 1
"""The devnet's tariff epoch. Unit: s. A real one takes hours; a demo cannot wait for its first price to be in force."""

STAKE: Final = 1_000 * WEI_PER_TALLY
FUNDS: Final = 10_000 * WEI_PER_TALLY
COIN: Final = 10**19


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """`home`: where everything lies. `slots`: per provider. `settle_interval`: as in the configuration file.

    `provider_config`: of every provider, `each_config` of the first, second, ... beyond that. `module`: as NodeProcess.
    """

    home: Path
    providers: int = 2
    slots: int = 8
    settle_interval: str = "10m"
    gateway_port: int = 0
    model_dir: Path = MODEL_DIR
    provider_config: dict[str, str] = field(default_factory=dict)
    client_config: dict[str, str] = field(default_factory=dict)
    each_config: tuple[dict[str, str], ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    module: str = "node"


class Cluster:
    """`async with Cluster(options) as cluster`: on entry everything serves."""

    def __init__(self, options: ClusterOptions) -> None:
        self.options = options
        self.home = options.home
        self.providers: list[NodeProcess] = []
        self.wallets: list[Signer] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Cluster:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    @property
    def url(self) -> str:
        """The gateway's base URL, ending in /v1."""
        return str(self.gateway.ready["url"])

    @property
    def api_key(self) -> str:
        return str(self.gateway.ready["api_key"])

    @property
    def env(self) -> dict[str, str]:
        return {"TALLY_SCRYPT_N": str(SCRYPT_N), "HF_HUB_OFFLINE": "1", **self.options.env}

    async def _start(self) -> None:
        self._prepare_home()
        self.anvil = Anvil(AnvilOptions(state=self.home / "anvil.json"))
        self._stack.callback(self.anvil.stop)
        clock = SystemClock()
        self.deployer = self.anvil.accounts[0]
        options = DeployOptions(epoch_seconds=EPOCH_SECONDS, exit_delay=60)
        self.deployment: Deployment = await deploy(self.anvil.rpc_url, self.deployer, clock, options)
        self.deployment.save(self.home / "deployment.json")
        names = [f"provider-{i + 1}" for i in range(self.options.providers)]
        ports = [free_port() for _ in names]
        self.wallets = [self._make_home(name) for name in names]
        self.client_wallet = self._make_home("gateway")
        accounts = [wallet.address for wallet in (*self.wallets, self.client_wallet)]
        await fund(self.anvil.rpc_url, self.deployment, self.deployer, clock, accounts, Wei(FUNDS), COIN)
        for index, (name, port) in enumerate(zip(names, ports, strict=True)):
            listen = {"listen_host": "127.0.0.1", "listen_port": port}
            self._configure(name, transport=listen, provider=self._sold(index))
            node = NodeProcess(name, self.home / name, ["provider", "run"], self.env, self.options.module)
            self.providers.append(node)
            self._stack.push_async_callback(node.stop)
            node.start()
        await asyncio.gather(*(node.wait_ready() for node in self.providers))
        await self._start_gateway()

    async def _start_gateway(self) -> None:
        self.gateway = await self.start_client("gateway")

    async def start_client(self, name: str) -> NodeProcess:
        """A gateway whose home and wallet exist. Raises: ProcessFailed."""
        peers = [str(node.ready["addresses"][0]) for node in self.providers]
        client = {"gateway_port": self.options.gateway_port, "deposit": "5", **self.options.client_config}
        self._configure(name, transport={"bootstrap": peers}, client=client)
        gateway = NodeProcess(name, self.home / name, ["gateway", "run"], self.env, self.options.module)
        self._stack.push_async_callback(gateway.stop)
        gateway.start()
        await gateway.wait_ready()
        return gateway

    async def add_client(self, name: str, tally: Wei) -> NodeProcess:
        """One more gateway, whose new wallet gets `tally` wei. Raises: ChainError, ProcessFailed."""
        wallet = self._make_home(name)
        clock = SystemClock()
        await fund(self.anvil.rpc_url, self.deployment, self.deployer, clock, [wallet.address], tally, COIN)
        return await self.start_client(name)

    def _sold(self, index: int) -> dict[str, object]:
        each = self.options.each_config
        return {
            "model_dir": str(self.options.model_dir),
            "model_name": MODEL_NAME if self.options.model_dir == MODEL_DIR else "",
            "slots": self.options.slots,
            "stake": str(STAKE // WEI_PER_TALLY),
            "settle_interval": self.options.settle_interval,
            "region": "devnet",
            **self.options.provider_config,
            **(each[index] if index < len(each) else {}),
        }

    def _prepare_home(self) -> None:
        """A devnet starts afresh: its chain does, so what older nodes remember would be of another world."""
        marker = self.home / "devnet.json"
        if marker.exists():
            shutil.rmtree(self.home)
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        marker.write_text("{}")

    def _make_home(self, name: str) -> Signer:
        """Data directory, password and wallet of one node."""
        home = self.home / name
        home.mkdir(mode=0o700)
        password = secrets.token_urlsafe(24)
        file = home / "password"
        file.touch(mode=0o600)
        file.write_text(password + "\n")
        return load_or_create(home / "keys", "wallet", password, scrypt_n=SCRYPT_N)

    def _configure(self, name: str, **tables: dict[str, object]) -> None:
        """Write one node's config.toml."""
        tables["chain"] = {"rpc_url": self.anvil.rpc_url, "deployment": str(self.home / "deployment.json")}
        lines = []
        for table, values in tables.items():
            lines.append(f"[{table}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        (self.home / name / "config.toml").write_text("\n".join(lines) + "\n")
