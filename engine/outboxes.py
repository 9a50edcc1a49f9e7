"""Outboxes: who consumes an engine's sequences, and what each consumer has not taken yet.

Several replicas may use one engine, each as a consumer that sees its own outputs alone. Knows no
engine, thread or process: the batcher guards it.
"""

from engine.outputs import SequenceOutput

OWNER = "owner"  # the consumer that started the engine, and which is always there
MAX_CLOSED_EARLY = 4096  # at most so many are on their way; 1 MB


class Outboxes:
    def __init__(self) -> None:
        self._outboxes: dict[str, dict[str, SequenceOutput]] = {OWNER: {}}
        self._consumers: dict[str, str] = {}  # request id of an open sequence → its consumer
        # Consumer and id of what was not open when it was closed: ended, or still to come.
        self._closed_early: dict[tuple[str, str], bool] = {}

    def __contains__(self, consumer: str) -> bool:
        return consumer in self._outboxes

    def enter(self, consumer: str) -> None:
        self._outboxes.setdefault(consumer, {})

    def leave(self, consumer: str) -> list[str]:
        """Forget a consumer; returns its open sequences, which nobody waits for any more."""
        self._outboxes.pop(consumer, None)
        left = [each for each, owner in self._consumers.items() if owner == consumer]
        for request_id in left:
            del self._consumers[request_id]
        return left

    def expects(self, request_id: str, consumer: str) -> bool:
        """Whether the consumer is here and has not closed this sequence before it came."""
        was_closed = self._closed_early.pop((consumer, request_id), False)
        return consumer in self._outboxes and not was_closed

    def open(self, request_id: str, consumer: str) -> None:
        """Outputs of this sequence belong to `consumer` until it ends."""
        self._consumers[request_id] = consumer

    def close(self, request_id: str, consumer: str) -> bool:
        """End a sequence; what it reported is dropped. False when it is not this consumer's.

        One that has not come yet is not expected any more.
        """
        if request_id not in self._consumers:
            self._closed_early[consumer, request_id] = True
            if len(self._closed_early) > MAX_CLOSED_EARLY:
                del self._closed_early[next(iter(self._closed_early))]
        if self._consumers.get(request_id) != consumer:
            return False
        del self._consumers[request_id]
        self._outboxes[consumer].pop(request_id, None)
        return True

    def put(self, output: SequenceOutput) -> None:
        """Merge with what its consumer has not taken yet."""
        consumer = self._consumers[output.request_id]
        if output.finish_reason is not None:
            del self._consumers[output.request_id]
        outbox = self._outboxes[consumer]
        earlier = outbox.setdefault(output.request_id, output)
        if earlier is not output:
            earlier.merge(output)

    def refuse(self, output: SequenceOutput, consumer: str) -> None:
        """Report a request that did not become a sequence."""
        if consumer in self._outboxes:
            self._outboxes[consumer][output.request_id] = output

    def take(self, consumer: str) -> list[SequenceOutput]:
        outbox = self._outboxes[consumer]
        outputs = list(outbox.values())
        outbox.clear()
        return outputs

    def filled(self) -> set[str]:
        """The consumers that have something to take."""
        return {consumer for consumer, outbox in self._outboxes.items() if outbox}

    def all(self) -> set[str]:
        return set(self._outboxes)
