"""HAProxy as `manta serve` configures it, in front of replicas that fail: nothing here is Ray's but
the generator of its configuration."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from ray.serve._private.haproxy import (
    BackendConfig,
    HAProxyApi,
    HAProxyConfig,
    ServerConfig,
    get_haproxy_binary,
)
from ray.serve.config import HTTPOptions

from serve_app import launch_env
from serve_app.launch_env import RETRIES
from serve_app.ports import free_ports

Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]
WRAPPER = Path(launch_env.__file__).with_name("haproxy.sh")


async def ends_without_a_byte(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def is_draining(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\nno")


async def breaks_off(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegin\r\n")
    await writer.drain()
    writer.transport.abort()


async def answers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")


async def fails_as_serve_does(writer: asyncio.StreamWriter) -> None:
    head = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n"
    writer.write(head + b"Content-Length: 4\r\n\r\noops")


async def fails_as_we_do(writer: asyncio.StreamWriter) -> None:
    head = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: 2\r\n\r\n{}")


class Replica:
    """A server that reads a request and then behaves; health checks pass while it listens."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.bodies: list[bytes] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        yield server.sockets[0].getsockname()[1]
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get /-/healthz"):
                    await answers(writer)
                    continue
                size = int(head.partition(b"content-length:")[2].split()[0])
                self.bodies.append(await reader.readexactly(size))
                await self.behaviour(writer)


@asynccontextmanager
async def haproxy(directory: Path, replicas: list[int]) -> AsyncIterator[str]:
    """The address of an HAProxy before these ports."""
    http, metrics, stats = free_ports(3)
    config = HAProxyConfig(
        socket_path=str(directory / "admin.sock"),
        metrics_socket_path=str(directory / "metrics.sock"),
        server_state_base=str(directory),
        server_state_file=str(directory / "server-state"),
        metrics_port=metrics,
        stats_port=stats,
        http_options=HTTPOptions(host="127.0.0.1", port=http),
        retry_on=RETRIES["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=int(RETRIES["RAY_SERVE_HAPROXY_RETRIES"]),
        observe_error_limit=int(RETRIES["RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT"]),
        bufsize=int(RETRIES["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]),
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
    )
    servers = [ServerConfig(f"r{port}", "127.0.0.1", port) for port in replicas]
    backend = BackendConfig("manta", "/", servers=servers, app_name="manta")
    path = directory / "haproxy.cfg"
    api = HAProxyApi(config, {"manta": backend}, str(path))
    api._generate_config_file_internal()
    process = await asyncio.create_subprocess_exec(
        str(WRAPPER),
        "-db",
        "-f",
        str(path),
        env={**os.environ, "MANTA_HAPROXY": get_haproxy_binary()},
        stderr=asyncio.subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{http}"
    try:
        async with httpx.AsyncClient() as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{url}/-/healthz")).status_code == 200:
                        break
                assert process.returncode is None
                await asyncio.sleep(0.02)
        yield url
    finally:
        process.terminate()
        await process.wait()


async def post(url: str, num_bytes: int = 100) -> httpx.Response:
    """httpx sends headers and body in packets of their own."""
    async with httpx.AsyncClient(timeout=30) as client:
        return await client.post(f"{url}/v1/completions", content=b"x" * num_bytes)


@pytest.mark.parametrize("failing", [ends_without_a_byte, is_draining])
@pytest.mark.parametrize("num_bytes", [100, 120_000])
def test_a_request_without_an_answer_goes_to_another_replica(
    tmp_path: Path, failing: Behaviour, num_bytes: int
) -> None:
    async def test() -> None:
        bad, good = Replica(failing), Replica(answers)
        async with (
            bad.listening() as first,
            good.listening() as second,
            haproxy(tmp_path, [first, second]) as url,
        ):
            responses = [await post(url, num_bytes) for _ in range(4)]
        assert [response.text for response in responses] == ["good"] * 4
        assert bad.bodies, "it was asked first at least once"
        assert good.bodies == [b"x" * num_bytes] * 4

    asyncio.run(test())


def test_a_replica_that_does_not_listen_any_more_costs_nobody_a_request(tmp_path: Path) -> None:
    async def test() -> None:
        leaving, good = Replica(answers), Replica(answers)
        async with good.listening() as second, contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(leaving.listening())
            async with haproxy(tmp_path, [first, second]) as url:
                assert [(await post(url)).text for _ in range(4)] == ["good"] * 4
                await stack.aclose()
                assert [(await post(url)).text for _ in range(4)] == ["good"] * 4

    asyncio.run(test())


def test_an_answer_that_has_begun_is_not_repeated(tmp_path: Path) -> None:
    async def test() -> None:
        bad = Replica(breaks_off)
        async with bad.listening() as port, haproxy(tmp_path, [port]) as url:
            with pytest.raises(httpx.RemoteProtocolError):
                await post(url)
        assert len(bad.bodies) == 1

    asyncio.run(test())


def test_only_our_own_errors_are_500(tmp_path: Path) -> None:
    async def test() -> None:
        replica = Replica(fails_as_we_do)
        async with replica.listening() as port, haproxy(tmp_path, [port]) as url:
            assert (await post(url)).status_code == 500
            replica.behaviour = fails_as_serve_does
            response = await post(url)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "no_replica"

    asyncio.run(test())


def test_when_no_replica_is_left_the_client_is_told_to_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        bad = Replica(ends_without_a_byte)
        async with bad.listening() as port, haproxy(tmp_path, [port]) as url:
            response = await post(url)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "no_replica"

    asyncio.run(test())
