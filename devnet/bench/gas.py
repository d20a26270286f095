"""Gas of settlements as a provider's node sends them: whole transactions on a local chain, base fee and calldata in."""

from __future__ import annotations

import hashlib
from typing import Any, Final

from devnet.anvil import Anvil
from devnet.deploy import DeployOptions, deploy
from node.chain.chain import ChainOptions, Web3Chain
from node.system import SystemClock
from protocol.errors import TallyError
from protocol.messages import Voucher
from protocol.signing import Signer
from protocol.units import WEI_PER_TALLY, Wei

PER_PAIR_AIM: Final = 10_500
"""Most gas per pair at N = 100. The floor is 9,255: calldata, a cold slot, ecrecover and a hundredth of 21,000."""

_DEPOSIT: Final = Wei(1_000 * WEI_PER_TALLY)
_STEP: Final = 3_141_592_653_589_793_238
"""What each settlement adds to a channel, in wei: an amount without zero bytes, so that calldata is not flattered."""


def _session(number: int) -> Signer:
    return Signer.from_secret(hashlib.sha256(b"bench session %d" % number).digest())


async def settlement_gas(counts: tuple[int, ...], say: Any) -> dict[str, Any]:
    """Gas by number of pairs, for a provider that has earned before. Raises: ChainError, AnvilError."""
    clock = SystemClock()
    sessions = [_session(number) for number in range(max(counts))]
    with Anvil() as anvil:
        wallet = anvil.accounts[0]
        deployment = await deploy(anvil.rpc_url, wallet, clock, DeployOptions())
        chain = Web3Chain(anvil.rpc_url, deployment, wallet, clock=clock, options=ChainOptions(poll_s=0.05))
        await chain.start()
        try:
            for number, session in enumerate(sessions):
                say(f"channel {number + 1} of {len(sessions)}")
                await chain.open_channel(wallet.address, session.secret, _DEPOSIT)
            # A provider's very first settlement pays for a fresh storage slot once; it is made and not counted.
            gas = [await _settle(chain, wallet, sessions[:count], turn) for turn, count in enumerate((1, *counts), 1)]
        finally:
            await chain.stop()
    per_pair = {count: -(-used // count) for count, used in zip(counts, gas[1:], strict=True)}
    most = max(counts)
    return {
        "gas": {str(count): used for count, used in zip(counts, gas[1:], strict=True)},
        "gas_per_pair": {str(count): used for count, used in per_pair.items()},
        "aim": PER_PAIR_AIM,
        "aim_at": 100,
        "met": per_pair[most] <= PER_PAIR_AIM if most >= 100 else None,
    }


async def _settle(chain: Web3Chain, wallet: Signer, sessions: list[Signer], turn: int) -> int:
    """Settle one voucher of each session; gas of the transaction. Raises: TallyError when one did not pay."""
    vouchers = []
    for number, session in enumerate(sessions):
        amount = Wei(turn * _STEP + number)
        signature = session.sign(chain.domain, Voucher(wallet.address, amount))
        vouchers.append((session.address, amount, signature))
    settled = await chain.send_settlement(await chain.prepare_settlement(wallet.address, vouchers))
    if len(settled.claimed) != len(sessions):
        raise TallyError(f"{len(settled.claimed)} of {len(sessions)} vouchers were paid")
    return settled.mined.gas
