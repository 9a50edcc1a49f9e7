"""The end of a replica that Serve stops: what is open ends just before Serve's SIGKILL."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve_app import draining
from tests.test_streams import run


def test_what_is_open_ends_before_serve_kills_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    async def test() -> None:
        ending = asyncio.ensure_future(
            draining.end_before_kill(lambda: calls.append("leave"), lambda: calls.append("stop"))
        )
        await asyncio.sleep(0.02)
        assert not calls
        replica._shutting_down = True
        await ending

    deployment = SimpleNamespace(graceful_shutdown_timeout_s=draining.LAST_WORDS_S)
    replica = SimpleNamespace(_shutting_down=False, _deployment_config=deployment)
    monkeypatch.setattr(draining, "_serves_replica", lambda: replica)
    monkeypatch.setattr(draining, "POLL_S", 0.001)
    run(test())
    assert calls == ["leave", "stop"]


class Engine:
    """An owner's, with a guest's sequence in it."""

    def __init__(self) -> None:
        self.group: object | None = object()
        self.has_work = True


def test_guests_end_before_their_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Others:
        def leave(self) -> None:
            calls.append("leave")

        async def forgotten(self) -> None:
            calls.append("forgotten")

    async def test() -> None:
        engine = Engine()
        waiting = asyncio.ensure_future(
            draining.wait_for_guests(cast(Any, Others()), cast(Any, engine))
        )
        await asyncio.sleep(0.02)
        assert not waiting.done()
        engine.has_work = False
        await asyncio.wait_for(waiting, 5)

    monkeypatch.setattr(draining, "GUESTS_POLL_S", 0.001)
    run(test())
    assert calls == ["leave", "forgotten"]


def test_outside_of_serve_nothing_is_watched() -> None:
    calls: list[str] = []
    run(draining.end_before_kill(lambda: calls.append("leave"), lambda: calls.append("stop")))
    assert not calls
