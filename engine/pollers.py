"""Pollers: the consumers of one engine that wait for outputs, and which of them still live.

The owner may wait for ever: it ends together with its engine. Any other consumer gets an answer
within POLL_S and asks again; one that did not ask for SILENCE_S is gone. Single-threaded: all of
it runs on the engine actor's loop. Knows no outputs.
"""

import asyncio
import logging
from collections.abc import Callable

from engine.errors import EngineDeadError
from engine.outboxes import OWNER

logger = logging.getLogger(__name__)

POLL_S = 2
SILENCE_S = 10  # a busy replica's loop may be held up for seconds


class Pollers:
    """`on_silence` is called with a consumer that is taken for dead."""

    def __init__(self, on_silence: Callable[[str], None]) -> None:
        self._on_silence = on_silence
        self._has_output = {OWNER: asyncio.Event()}
        self._waiting: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def enter(self, consumer: str) -> None:
        self._has_output[consumer] = asyncio.Event()
        self._expect(consumer)

    def leave(self, consumer: str) -> bool:
        """False when it is not here, or no more."""
        self._forgo(consumer)
        return self._has_output.pop(consumer, None) is not None

    def check(self, consumer: str) -> None:
        """EngineDeadError for one that was silent too long: for it this engine is lost."""
        if consumer not in self._has_output:
            raise EngineDeadError(f"the engine had heard nothing of this replica for {SILENCE_S} s")

    async def wait(self, consumer: str) -> None:
        """Until there is something to take or, but for the owner, POLL_S have passed."""
        self.check(consumer)
        assert consumer not in self._waiting, "a consumer's next poll follows the last one's end"
        has_output = self._has_output[consumer]
        self._forgo(consumer)
        self._waiting.add(consumer)
        try:
            async with asyncio.timeout(None if consumer == OWNER else POLL_S):
                await has_output.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(consumer)
        has_output.clear()
        self.check(consumer)  # it may have left meanwhile
        if consumer != OWNER:
            self._expect(consumer)

    def wake(self, consumers: set[str]) -> None:
        for consumer in consumers & self._has_output.keys():
            self._has_output[consumer].set()

    def _expect(self, consumer: str) -> None:
        loop = asyncio.get_running_loop()
        self._timers[consumer] = loop.call_later(SILENCE_S, self._lose, consumer)

    def _forgo(self, consumer: str) -> None:
        if (timer := self._timers.pop(consumer, None)) is not None:
            timer.cancel()

    def _lose(self, consumer: str) -> None:
        logger.warning("a replica that used this engine fell silent; its sequences end")
        self.leave(consumer)
        self._on_silence(consumer)
