"""Every error the engine raises on purpose.

    MantaError
      ├ ConfigError          an engine setting is wrong            → the process does not start
      ├ CheckpointError      a file, tensor or shape is wrong      → the process does not start
      ├ InvalidRequestError  one request is wrong                  → 400
      ├ LogitsError          no token can be drawn for one request → 500
      ├ QueueFullError       bounded admission refused a request   → 429
      ├ EngineDeadError      the engine's loop or process is gone  → 503
      └ EngineKilledError    engines died with one request in them → 500

A message names the offending value, what is allowed and the mend.
"""


class MantaError(Exception):
    """Base of all errors below."""


class ConfigError(MantaError):
    """An engine or serving setting that cannot work."""


class CheckpointError(MantaError):
    """A checkpoint that cannot be loaded: names file, tensor, expected and found."""


class InvalidRequestError(MantaError, ValueError):
    """A request no engine state could ever serve; `param` is the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return type(self), (str(self), self.param)


class LogitsError(MantaError):
    """A sequence's logits are NaN or infinite."""


class QueueFullError(MantaError):
    """The waiting queue is at its bound; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.retry_after)


class EngineDeadError(MantaError):
    """The engine stopped; the message carries the first cause."""


class EngineKilledError(MantaError):
    """A request that several engines died computing, the last one it alone under suspicion."""
