"""A replica's part in the directory: it goes on, and leaves."""

import asyncio
from typing import Any

import pytest

from serve_app import directory
from serve_app.directory import Directory, Entry, Member
from tests.test_engines import entry
from tests.test_streams import run


class Actor:
    """The directory in this process, with an actor's way to be called."""

    def __init__(self) -> None:
        self.directory = Directory()
        self.exchange = self.leave = self

    @property
    def remote(self) -> Any:
        return self._call

    def _call(self, argument: Any) -> Any:
        if isinstance(argument, str):
            return self.directory.leave(argument)
        told = self.directory.exchange(argument)

        async def answer() -> list[Entry]:
            return told

        return answer()


def test_a_fault_of_one_exchange_does_not_end_all(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, heard = Actor(), list[list[Entry]]()
    actor.directory.exchange(entry("other"))
    faults = [ValueError("a bug")]

    async def describe() -> Entry:
        if faults:
            raise faults.pop()
        return entry("me")

    async def test() -> None:
        member = Member("app", starts=True, describe=describe, on_others=heard.append)
        async with asyncio.timeout(5):
            while len(heard) < 3:
                await asyncio.sleep(0.001)
        member.leave()
        await member.forgotten()
        assert [each.replica_id for each in actor.directory.exchange(entry("third"))] == ["other"]

    monkeypatch.setattr(Member, "_find", lambda self: actor)
    for name in ("INTERVAL_S", "ALONE_S", "FORGOTTEN_S"):
        monkeypatch.setattr(directory, name, 0.001)
    run(test())
    assert [each.replica_id for each in heard[-1]] == ["other"]
