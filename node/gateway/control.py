"""The control socket: how commands of this user speak to the node that runs in a home, without keys or ports.

Only the owner of the home can open it (mode 0600), so it asks for no password; it never carries a secret. One call is
one HTTP request, `POST /<route>` with a JSON object, answered by a JSON object; a failure is `{"error": ...}` with the
text the node gives. The client side is the standard library's alone, because `tally status` must start at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from protocol.errors import TallyError

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger("tally.gateway.control")

MAX_PATH_BYTES: Final = 103
"""Longest socket path the kernels we run on take (macOS: 104 with the final zero, Linux: 108). Unit: bytes. A longer
home gets its socket in the temporary directory, and a file beside the home's says where."""

MAX_REQUEST_BYTES: Final = 1 << 20
"""Largest request body. Parameters are a few names and numbers; a megabyte is far above any."""

Route = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
"""What answers one route: parameters in, JSON values out. A TallyError's text goes to the caller."""


class ControlUnavailable(TallyError):
    """No node answers at the control socket: none runs in this home, or it is starting or stopping."""


class ControlRefused(TallyError):
    """The node answered that it cannot do this; its own text."""


class ControlUnknown(ControlRefused):
    """The node has no such route: another role answers it."""


def _recorded(path: Path) -> Path:
    """The file that says where the socket of `path` really is."""
    return path.with_name(path.name + ".path")


def socket_path(path: Path) -> Path:
    """Where the socket for `path` is found: there, or where the file beside it says when `path` is too long."""
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        return path
    try:
        return Path(_recorded(path).read_text(encoding="utf-8").strip())
    except OSError:
        return path


def _connect(path: Path, timeout_s: float) -> socket.socket:
    """Raises: ControlUnavailable, also for a socket that is another user's."""
    where = socket_path(path)
    if len(os.fsencode(where)) > MAX_PATH_BYTES:
        raise ControlUnavailable(f"no node is running in {path.parent}")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        if where.lstat().st_uid != os.getuid():
            raise ControlUnavailable(f"the control socket {where} belongs to another user; it was not used")
        connection.connect(str(where))
    except OSError as exc:
        connection.close()
        raise ControlUnavailable(f"no node is running in {path.parent}") from exc
    except BaseException:
        connection.close()
        raise
    return connection


class ControlServer:
    """Answers `routes` at the socket `path`. One node per home: a second one is refused."""

    def __init__(self, path: Path, routes: Mapping[str, Route]) -> None:
        self._path = path
        self._routes = dict(routes)
        self._bound: Path | None = None
        self._own_directory: Path | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen. Raises: ControlRefused when another node answers there or the socket cannot be made."""
        from aiohttp import web  # slow to import

        with suppress(ControlUnavailable):
            _connect(self._path, 1.0).close()
            raise ControlRefused(
                f"another node already runs in {self._path.parent}. Nothing was started. Stop it, or use another home"
            )
        application = web.Application(client_max_size=MAX_REQUEST_BYTES)
        application.router.add_post("/{route}", self._answer)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.SockSite(runner, self._listen()).start()
        except OSError as exc:
            await runner.cleanup()
            self._remove()
            raise ControlRefused(
                f"the control socket {self._path} cannot be made: {exc.strerror or exc}. Nothing was started. "
                f"Make {self._path.parent} belong to the user who runs the node"
            ) from exc
        self._runner = runner

    async def stop(self) -> None:
        """Stop answering and take the socket away. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
            self._remove()

    def _listen(self) -> socket.socket:
        """A listening socket that is 0600 from its first moment. Raises: OSError."""
        where = self._place()
        where.unlink(missing_ok=True)  # nobody answered there: it is a dead node's
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode comes from the umask at bind; a chmod afterwards would leave a moment in which others can connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(where))
            listener.listen(16)
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        finally:
            os.umask(before)
        self._bound = where
        return listener

    def _place(self) -> Path:
        """`path`, or a private directory of its own when `path` is too long for a socket. Raises: OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if len(os.fsencode(self._path)) <= MAX_PATH_BYTES:
            return self._path
        tag = hashlib.sha256(os.fsencode(self._path)).hexdigest()[:12]
        self._own_directory = Path(tempfile.mkdtemp(prefix=f"tally-{tag}-"))
        where = self._own_directory / "control.sock"
        beside = _recorded(self._path).with_suffix(".new")
        beside.write_text(f"{where}\n", encoding="utf-8")
        beside.replace(_recorded(self._path))
        return where

    def _remove(self) -> None:
        bound, self._bound = self._bound, None
        directory, self._own_directory = self._own_directory, None
        with suppress(OSError):
            if bound is not None:
                bound.unlink(missing_ok=True)
            if directory is not None:
                _recorded(self._path).unlink(missing_ok=True)
                shutil.rmtree(directory)

    async def _answer(self, request: web.Request) -> web.Response:
        from aiohttp import web

        name = request.match_info["route"]
        route = self._routes.get(name)
        if route is None:
            return web.json_response(
                {"error": f"the node that runs in this home does not answer {name!r}: its role is another"}, status=404
            )
        try:
            params = json.loads(await request.read() or b"{}")
        except ValueError:
            params = None
        if not isinstance(params, dict):
            return web.json_response({"error": "the parameters must be a JSON object"}, status=400)
        try:
            return web.json_response(await route(params))
        except TallyError as exc:
            return web.json_response({"error": str(exc)}, status=409)
        except Exception:
            log.exception("a control request failed", extra={"route": name})
            return web.json_response({"error": f"{name} failed inside the node; its log says where"}, status=500)


class ControlClient:
    """Calls the node whose home holds the socket `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def call(self, route: str, /, timeout_s: float = 10.0, **params: Any) -> dict[str, Any]:
        """Raises: ControlUnavailable (nobody answers in time), ControlRefused with the node's own text."""
        import asyncio

        return await asyncio.to_thread(self.call_now, route, timeout_s, **params)

    def call_now(self, route: str, timeout_s: float = 10.0, /, **params: Any) -> dict[str, Any]:
        """`call` without an event loop. `timeout_s` bounds each read. Raises: the same."""
        body = json.dumps(params).encode()
        head = f"POST /{route} HTTP/1.0\r\nHost: node\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        with _connect(self._path, timeout_s) as connection:
            try:
                connection.sendall(head.encode() + b"\r\n\r\n" + body)
                raw = bytearray()
                while piece := connection.recv(65_536):
                    raw += piece
            except OSError as exc:
                raise ControlUnavailable(
                    f"the node in {self._path.parent} did not answer {route!r} within {timeout_s:g} s"
                ) from exc
        return self._read(route, bytes(raw))

    def _read(self, route: str, raw: bytes) -> dict[str, Any]:
        head, _, body = raw.partition(b"\r\n\r\n")
        try:
            status = int(head.split(None, 2)[1])
            answer = json.loads(body)
        except (ValueError, IndexError) as exc:
            raise ControlUnavailable(f"the node in {self._path.parent} broke off while answering {route!r}") from exc
        if status != 200 or not isinstance(answer, dict):
            said = answer.get("error") if isinstance(answer, dict) else None
            kind = ControlUnknown if status == 404 else ControlRefused
            raise kind(str(said or f"the node answered {route!r} with status {status}"))
        return answer
