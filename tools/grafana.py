"""Writes configs/grafana/manta.json: a dashboard for Ray's Grafana, on the names Ray exports.

    python -m tools.grafana

Means are made of counters and not of histograms' `_sum`, which Ray's exporter rounds to the
middles of buckets.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "configs" / "grafana" / "manta.json"
SERVE = 'application=~"$Application",ray_io_cluster=~"$Cluster"'
OURS = f'model_name=~"$Model",replica=~"$Replica",{SERVE}'
SECONDS = "ray_manta_request_seconds_total"
QUANTILES = (0.5, 0.9, 0.99)
COLUMNS, WIDTH, HEIGHT = 3, 8, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries`: PromQL by the legend of its series."""

    title: str
    queries: dict[str, str]
    unit: str = "short"  # Grafana's name
    description: str = ""
    stacked: bool = False


def rate(metric: str, by: str = "", labels: str = OURS) -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{labels}}}[$interval]))"


def gauge(metric: str, by: str = "replica", how: str = "sum", labels: str = OURS) -> str:
    return f"{how} by ({by}) ({metric}{{{labels}}})"


def quantiles(histogram: str) -> dict[str, str]:
    return {
        f"p{100 * q:g}": f"histogram_quantile({q}, {rate(f'{histogram}_bucket', 'le')})"
        for q in QUANTILES
    }


def mean_seconds(part: str) -> str:
    """Of a part of a request, exactly."""
    histogram = f"ray_vllm_request_{part}_time_seconds"
    if part == "framework":
        histogram = "ray_manta_request_framework_time_seconds"
    labels = f'{OURS},part="{part}"'
    return f"{rate(SECONDS, labels=labels)} / {rate(f'{histogram}_count')}"


ROWS: dict[str, list[Panel]] = {
    "Load": [
        Panel(
            "Sequences ended per second",
            {"{{finished_reason}}": rate("ray_vllm_request_success_total", "finished_reason")},
            "reqps",
            "By reason: stop and length are answers, abort a client that left, error a failure.",
            stacked=True,
        ),
        Panel(
            "Tokens per second",
            {
                "generated": rate("ray_vllm_generation_tokens_total"),
                "of prompts": rate("ray_vllm_prompt_tokens_total"),
            },
        ),
        Panel(
            "Requests refused or failed per second",
            {
                "{{error_code}} {{route}}": rate(
                    "ray_serve_num_http_error_requests_total", "error_code, route", SERVE
                )
            },
            "reqps",
            "HTTP statuses from 400 on. 429: the queue is full; 503: an engine or replica is gone.",
        ),
        Panel(
            "Sequences running",
            {"{{replica}}": gauge("ray_vllm_num_requests_running")},
            stacked=True,
        ),
        Panel(
            "Sequences waiting",
            {"{{replica}}": gauge("ray_vllm_num_requests_waiting")},
            description="What autoscaling looks at.",
            stacked=True,
        ),
        Panel(
            "Replicas",
            {
                "healthy": gauge(
                    "ray_serve_deployment_replica_healthy", "deployment", labels=SERVE
                ),
                "wanted": gauge(
                    "ray_serve_autoscaling_target_replicas", "deployment", "max", SERVE
                ),
            },
        ),
    ],
    "Latency": [
        Panel("Time to first token", quantiles("ray_vllm_time_to_first_token_seconds"), "s"),
        Panel("Between tokens", quantiles("ray_vllm_inter_token_latency_seconds"), "s"),
        Panel("Whole sequence", quantiles("ray_vllm_e2e_request_latency_seconds"), "s"),
        Panel(
            "Where the time goes, mean of a sequence",
            {part: mean_seconds(part) for part in ("framework", "queue", "prefill", "decode")},
            "s",
            "framework: validation, chat template, tokenising. queue: from its arrival in the "
            "engine until it was first scheduled. prefill: from there to the first token. decode: "
            "from the first token to the last.",
            stacked=True,
        ),
        Panel("Queue", quantiles("ray_vllm_request_queue_time_seconds"), "s"),
        Panel("Prefill", quantiles("ray_vllm_request_prefill_time_seconds"), "s"),
    ],
    "Engine": [
        Panel(
            "KV cache in use",
            {"{{replica}}": gauge("ray_vllm_kv_cache_usage_perc", how="max")},
            "percentunit",
        ),
        Panel(
            "Prompt tokens found in the prefix cache",
            {
                "share": f"{rate('ray_vllm_prefix_cache_hits_total')} / "
                f"{rate('ray_vllm_prefix_cache_queries_total')}"
            },
            "percentunit",
        ),
        Panel(
            "Tokens of a step",
            quantiles("ray_vllm_iteration_tokens_total"),
            description="Near max_num_batched_tokens: prefills fill the steps.",
        ),
        Panel(
            "Preemptions per second",
            {"{{replica}}": rate("ray_vllm_num_preemptions_total", "replica")},
            description="The KV cache is too small for what runs: tokens are computed twice.",
        ),
        Panel(
            "Engines replaced",
            {
                "{{replica}}": "sum by (replica) (increase(ray_manta_engine_recoveries_total"
                f"{{{OURS}}}[$interval]))"
            },
            description="Engines that died and were started again; their streams went on.",
        ),
        Panel(
            "Lengths, tokens of a sequence",
            {
                f"{what} {name}": query
                for what in ("prompt", "generation")
                for name, query in quantiles(f"ray_vllm_request_{what}_tokens").items()
            },
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    return {
        "uid": "manta",
        "title": "Manta",
        "tags": ["manta", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": list(_variables())},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    shown = "ray_vllm_num_requests_running"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 2},
        _query_variable("Cluster", f"label_values({shown}, ray_io_cluster)"),
        _query_variable("Application", f"label_values({shown}, application)"),
        _query_variable("Model", f"label_values({shown}, model_name)"),
        _query_variable("Replica", f'label_values({shown}{{model_name=~"$Model"}}, replica)'),
        {
            "name": "interval",
            "type": "custom",
            "query": "1m,5m,15m,1h",
            "current": {"selected": True, "text": "1m", "value": "1m"},
        },
    ]


def _query_variable(name: str, query: str) -> dict[str, Any]:
    """All of them unless chosen; `.*` also takes series without the label."""
    return {
        "name": name,
        "type": "query",
        "datasource": "${datasource}",
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": COLUMNS * WIDTH, "x": 0, "y": y}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place})
        y += 1
        for index, panel in enumerate(row):
            line, column = divmod(index, COLUMNS)
            at = {"h": HEIGHT, "w": WIDTH, "x": column * WIDTH, "y": y + line * HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, at))
        y += -(-len(row) // COLUMNS) * HEIGHT
    return panels


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    custom = {
        "fillOpacity": 30 if panel.stacked else 0,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "showPoints": "never",
    }
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": "${datasource}",
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expr, "legendFormat": legend}
            for index, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def render() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
    print(FILE)
