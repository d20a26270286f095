"""What is typed on the command line, parsed exactly: amounts of TALLY, addresses, HOST:PORT."""

from __future__ import annotations

import re
from typing import Any

import click

from node.config_values import tally
from protocol.units import Address, Wei


class HostPort(click.ParamType[tuple[str, int]]):
    """`HOST:PORT`, `:PORT` or `[IPv6]:PORT`."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Raises: BadParameter."""
        if isinstance(value, tuple):
            return value
        host, colon, port = str(value).rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65_535:
            self.fail(f"{value!r} is not HOST:PORT, such as 0.0.0.0:4001", param, ctx)
        return host.strip("[]") or "0.0.0.0", int(port)


class Amount(click.ParamType[Wei]):
    """TALLY as a decimal, `1.5`; wei out, never rounded."""

    name = "tally"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Wei:
        """Raises: BadParameter, also for zero."""
        if isinstance(value, int):
            return Wei(value)
        try:
            wei = Wei(tally.parse(value))
        except (ValueError, ArithmeticError) as exc:
            self.fail(f"{exc}; expected {tally.form}", param, ctx)
        if wei == 0:
            self.fail("the amount is zero", param, ctx)
        return wei


class WalletAddress(click.ParamType[Address]):
    """0x and 40 hexadecimal digits."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        """Raises: BadParameter."""
        if isinstance(value, bytes):
            return Address(value)
        if not re.fullmatch(r"0x[0-9a-fA-F]{40}", str(value)):
            self.fail(f"{value!r} is no address; expected 0x and 40 hexadecimal digits", param, ctx)
        return Address(bytes.fromhex(str(value)[2:]))
