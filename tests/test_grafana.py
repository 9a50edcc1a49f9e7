"""The Grafana dashboard queries what replicas export, and is what its generator writes."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.metrics import Metrics
from tests.conftest import MODEL_NAME
from tests.test_api_load import metrics_url
from tools.grafana import FILE, dashboard, render

KEYWORDS = {"sum", "max", "rate", "increase", "by", "histogram_quantile", "label_values"}


def expressions() -> Iterator[str]:
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def queried() -> set[str]:
    """The metrics of all expressions."""
    found: set[str] = set()
    for expression in expressions():
        bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)|, \w+\)$", " ", expression)
        found |= set(re.findall(r"[a-z]\w*", bare)) - KEYWORDS
    return found


def exported(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], dict[str, set[str]]]:
    """Names of a replica's metrics as Ray exports them, and the labels of each."""
    labels: dict[str, set[str]] = {}
    kinds: Any = {
        Gauge: ("",),
        Counter: ("_total",),
        Histogram: ("_bucket", "_sum", "_count"),
    }
    for kind, endings in kinds.items():
        monkeypatch.setattr(kind, "__init__", _recorder(labels, endings))
        monkeypatch.setattr(kind, "set_default_tags", lambda self, tags: None)

    async def make() -> None:
        Metrics("tiny", 1000)

    asyncio.run(make())
    return set(labels), labels


def _recorder(labels: dict[str, set[str]], endings: tuple[str, ...]) -> Any:
    def init(self: Any, name: str, description: str, *more: Any) -> None:
        for ending in endings:
            labels[f"ray_{name}{ending}"] = set(more[-1])

    return init


def test_the_file_is_what_the_generator_writes() -> None:
    assert FILE.read_text() == render(), "run python -m tools.grafana"


def test_every_metric_of_ours_is_one_that_a_replica_has(monkeypatch: pytest.MonkeyPatch) -> None:
    names, labels = exported(monkeypatch)
    ours = {name for name in queried() if not name.startswith("ray_serve_")}
    assert len(ours) > 15
    assert ours <= names
    for part in re.findall(r"(\w+)\{[^}]*part=", json.dumps(dashboard())):
        assert "part" in labels[part]
    assert "finished_reason" in labels["ray_vllm_request_success_total"]


def test_panels_do_not_overlap_and_have_their_own_numbers() -> None:
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_variable_is_defined() -> None:
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard()))) - {"__all"}
    assert used == {variable["name"] for variable in dashboard()["templating"]["list"]}


@pytest.mark.ray
def test_every_metric_of_serve_is_one_that_it_exports(http: httpx.Client) -> None:
    """With the labels the queries group by."""
    http.post("/v1/completions", json={"model": MODEL_NAME, "prompt": "a", "max_tokens": 2})
    http.post("/v1/completions", json={"model": "another", "prompt": "a"})
    wanted = {name for name in queried() if name.startswith("ray_serve_")}
    wanted.add("ray_vllm_num_requests_running")
    # All that was seen: a gauge that Serve sets every 10 s is in one export and not in the next.
    text = ""
    for _ in range(100):
        text += httpx.get(metrics_url()).text
        if wanted <= set(re.findall(r"^(\w+)\{", text, re.MULTILINE)):
            break
        asyncio.run(asyncio.sleep(0.2))
    else:
        raise AssertionError(wanted - set(re.findall(r"^(\w+)\{", text, re.MULTILINE)))
    for name in wanted:
        (line, *_) = re.findall(rf"^{name}\{{(.*)\}}", text, re.MULTILINE)
        assert 'application="tiny"' in line
    assert re.search(r'^ray_vllm_num_requests_running\{.*replica="', text, re.MULTILINE)
    assert re.search(r'^ray_serve_num_http_error_requests_total\{.*error_code="404"', text, re.M)
