"""An HTTP proxy before an object store that breaks what passes through it, by rule and for a time.

Requests are forwarded with their own Host header, so signatures stay valid: the client has signed for the proxy's address, and
that is what the store sees.
"""

import asyncio
import contextlib
import random
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal, Self

from aiohttp import ClientSession, DummyCookieJar, TCPConnector, web
from yarl import URL

from raysed.cluster.local import free_ports
from raysed.errors import ResourcesError

Kind = Literal[
    "refuse", "slowdown", "error", "expired", "skewed", "denied", "stall", "slow", "cut", "flip", "lose"
]
_ANSWERS = {
    "slowdown": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
    "skewed": (403, "RequestTimeTooSkewed", "The difference between the request time and now is too large."),
    "denied": (403, "AccessDenied", "Access Denied"),
}
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "te", "trailer", "upgrade"}
SLOW_SECONDS, SLOW_BYTES = 0.5, 1 << 20
"""Latency of a slow answer, and its bytes a second."""


@dataclass(frozen=True)
class Rule:
    """What happens to the requests that it concerns.

    refuse: the port is closed and open connections are reset.  slowdown, error, expired, skewed, denied: answered with that S3 error.
    stall: no answer while the rule holds.  slow: latency and a narrow pipe.  cut: half of the body.  flip: one bit of a GET body.
    lose: the request is carried out, the answer is not given.
    """

    kind: Kind
    seconds: float | None = None
    """For how long, from when it is added; None is until `clear`."""
    methods: tuple[str, ...] = ()
    """None named means all."""
    path: str = ""
    """Regular expression to be found in path and query."""
    count: int | None = None
    """At most so many requests."""
    share: float = 1.0
    """Of the requests that match."""


@dataclass(frozen=True)
class Injection:
    """One request that was broken."""

    at: float
    """time.time()."""
    kind: str
    method: str
    path: str


class FaultProxy:
    """The proxy, in a thread of its own, on a port of loopback.

    Args:
        target: URL of the object store.
        seed: of the draws for rules with a share.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.target = target
        self.port = free_ports(1)[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.injected: list[Injection] = []
        self.requests = 0
        self._rules: list[dict[str, Any]] = []
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="raysed-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def add(self, rule: Rule) -> None:
        """Begin to apply a rule."""
        until = time.monotonic() + rule.seconds if rule.seconds is not None else float("inf")
        self._call(self._add({"rule": rule, "until": until, "left": rule.count or float("inf")}))

    def clear(self) -> None:
        """End all rules."""
        self._call(self._end(list(self._rules)))

    def counts(self) -> dict[str, int]:
        """Broken requests by kind."""
        kinds = [i.kind for i in list(self.injected)]
        return {k: kinds.count(k) for k in sorted(set(kinds))}

    def _call(self, task: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(task, self._loop).result(30)

    async def _start(self) -> None:
        self._session = ClientSession(
            connector=TCPConnector(limit=0), auto_decompress=False, cookie_jar=DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )  # fmt: skip
        server = web.Server(self._handle, access_log=None)
        self._runner = web.ServerRunner(server, shutdown_timeout=1.0)
        await self._runner.setup()
        self._site: web.TCPSite | None = None
        self._holder: socket.socket | None = None
        await self._listen()

    async def _stop(self) -> None:
        await self._end(list(self._rules))
        if self._holder:
            self._holder.close()
        await self._session.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._runner.cleanup(), 5)

    def _hold_port(self) -> None:
        """A port that is bound and not listened at refuses connections, and nobody else is given it."""
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", self.port))
        except OSError:
            holder.close()
            return
        self._holder = holder

    async def _listen(self) -> None:
        if self._holder:
            self._holder.close()
            self._holder = None
        for _ in range(50):
            site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
            try:
                await site.start()
            except OSError:  # somebody's outgoing connection has the port for a moment
                await site.stop()
                await asyncio.sleep(0.1)
                continue
            self._site = site
            return
        raise ResourcesError(f"port {self.port} was taken while the proxy refused connections: run it again")

    async def _add(self, held: dict[str, Any]) -> None:
        self._rules.append(held)
        rule = held["rule"]
        if rule.kind == "refuse" and self._site:
            site, self._site = self._site, None
            await site.stop()
            self._hold_port()
        if rule.seconds is not None:
            self._loop.call_later(rule.seconds, lambda: self._loop.create_task(self._end([held])))

    async def _end(self, ended: list[dict[str, Any]]) -> None:
        self._rules = [r for r in self._rules if r not in ended]
        if self._site is None and not any(r["rule"].kind == "refuse" for r in self._rules):
            await self._listen()

    def _matching(self, method: str, path: str) -> dict[str, Any] | None:
        for held in self._rules:
            rule = held["rule"]
            if rule.methods and method not in rule.methods:
                continue
            if held["left"] < 1 or not re.search(rule.path, path) or self._random.random() >= rule.share:
                continue
            held["left"] -= 1
            return held
        return None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._through(request)
        except ConnectionResetError:  # the client has gone, perhaps killed
            return web.Response()

    async def _through(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests += 1
        held = self._matching(request.method, request.raw_path)
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await request.content.read()  # `request.read` has a limit of a megabyte
        if held is None:
            return await self._answer(request, *await self._forward(request, body))
        kind = held["rule"].kind
        self.injected.append(Injection(time.time(), kind, request.method, request.raw_path))
        if kind in _ANSWERS:
            status, code, text = _ANSWERS[kind]
            xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>"
            return await self._answer(request, status, {"Content-Type": "application/xml"}, xml.encode())
        if kind == "refuse":
            return self._reset(request)
        if kind == "stall":
            while held in self._rules and not self._gone(request):
                await asyncio.sleep(0.05)
            return self._reset(request)
        status, headers, data = await self._forward(request, body)
        if kind == "lose":
            return self._reset(request)
        if kind == "slow":
            await asyncio.sleep(SLOW_SECONDS + len(data) / SLOW_BYTES)
        if kind == "flip" and data:
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        return await self._answer(request, status, headers, data, cut=kind == "cut")

    async def _forward(self, request: web.BaseRequest, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP]
        url = URL(self.target + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
            return answer.status, kept, await answer.read()

    async def _answer(
        self,
        request: web.BaseRequest,
        status: int,
        headers: dict[str, str],
        data: bytes,
        *,
        cut: bool = False,
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=headers)
        if request.method == "HEAD":  # its answer states the length of what it does not bring
            data = b""
        else:
            response.content_length = len(data)
        await response.prepare(request)
        await response.write(data[: len(data) // 2] if cut else data) if data else None
        if cut:
            return self._reset(request, response)
        await response.write_eof()
        return response

    def _gone(self, request: web.BaseRequest) -> bool:
        return request.transport is None or request.transport.is_closing()

    def _reset(
        self, request: web.BaseRequest, response: web.StreamResponse | None = None
    ) -> web.StreamResponse:
        """Close the connection without an answer."""
        if request.transport is not None:
            request.transport.close() if response else request.transport.abort()
        return response or web.Response()
