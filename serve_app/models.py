"""Models: all models behind this address, by the name that requests give.

The first is the replica's own. Of any other one the replica has text work and limits, and the
engines of that model's own replicas; its tokenizer is loaded for the first request.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve_app.engines import Engines
from serve_app.errors import ApiError, shown
from serve_app.metrics import Metrics
from serve_app.model_files import load_tokenizer
from serve_app.model_spec import Context, ModelSpec
from serve_app.protocol.models import ModelCard
from serve_app.served_model import ServedModel, max_body_bytes
from serve_app.tracing import RequestTracer

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer
    from serve_app.directory import Entry


class OtherModel:
    """A model whose replicas are others than this one. `context` holds until one is heard of."""

    def __init__(
        self,
        spec: ModelSpec,
        created: int,
        engines: Engines,
        metrics: Metrics,
        context: Context,
        tracer: RequestTracer | None = None,
    ) -> None:
        self.spec = spec
        self.max_body_bytes = max_body_bytes(spec.limits, context.session_len)
        self.engines = engines
        self._context = context
        self._created = created
        self._metrics = metrics
        self._tracer = tracer
        self._tokenizer: asyncio.Task[Tokenizer] | None = None

    async def load(self) -> ServedModel:
        """For text work. Generation waits for an engine, which Serve starts if there is none."""
        if self._tokenizer is None or (self._tokenizer.done() and self._tokenizer.exception()):
            loading = asyncio.to_thread(load_tokenizer, self.spec.config)
            self._tokenizer = asyncio.ensure_future(loading)
        # Shielded: a client that leaves must not take it from others.
        tokenizer = await asyncio.shield(self._tokenizer)
        return ServedModel(
            self.spec,
            self._created,
            tokenizer,
            self.engines,
            self._metrics,
            self._tracer,
            self._context,
        )

    def card(self) -> ModelCard:
        info = self.engines.last_info
        return ModelCard(
            id=self.spec.name,
            created=self._created,
            max_model_len=None if info is None else info.session_len,
        )


class Models:
    def __init__(self, own: ServedModel, others: Sequence[OtherModel] = ()) -> None:
        self.own = own
        self._others = {other.spec.name: other for other in others}

    @property
    def names(self) -> list[str]:
        return [self.own.name, *self._others]

    @property
    def max_body_bytes(self) -> int:
        """Of any: a body is read before its model is known."""
        others = [other.max_body_bytes for other in self._others.values()]
        return max([self.own.max_body_bytes, *others])

    async def get(self, name: str) -> ServedModel:
        """ApiError 404 for a name that no model has."""
        if name == self.own.name:
            return self.own
        self._check(name)
        return await self._others[name].load()

    def card(self, name: str) -> ModelCard:
        """ApiError 404 as well."""
        if name != self.own.name:
            self._check(name)
            return self._others[name].card()
        return ModelCard(
            id=self.own.name, created=self.own.created, max_model_len=self.own.info.session_len
        )

    @property
    def num_open(self) -> int:
        """Sequences of all models that this replica has open."""
        return sum(engines.num_open for engines in self._engines().values())

    def update(self, entries: "Sequence[Entry]") -> None:
        """What the directory tells of other replicas."""
        for name, engines in self._engines().items():
            if name == self.own.name and not self.own.spec.cache_aware_routing:
                continue
            engines.update([entry for entry in entries if entry.model == name])

    def stop(self) -> None:
        """End the own engine and leave the others; requests that are still open fail."""
        for engines in self._engines().values():
            engines.stop()

    def _engines(self) -> dict[str, Engines]:
        others = {name: other.engines for name, other in self._others.items()}
        return {self.own.name: self.own.engine, **others}

    def _check(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(map(repr, self.names))
            raise ApiError(
                404,
                f"the model {shown(name)} does not exist; this server has {known}",
                param="model",
                code="model_not_found",
            )
