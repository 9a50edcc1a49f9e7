"""What cache-aware routing finds in the caches of several replicas, against Serve's own choice.

    python -m benchmarks.routing [--quick]

Tenants whose prompts begin with a long text of their own, three replicas under `manta serve`, each
with a KV cache that holds half of those texts. Requests of all tenants come mixed, some at once;
HAProxy gives each to the replica with the fewest connections. With routing, that replica sends it
to the engine where its beginning is cached; without, its own engine computes it.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.load import Connection, Reply
from benchmarks.record import Table, save, show
from benchmarks.server import MANTA, running
from engine.tokenizer import Tokenizer
from serve_app.launch_plan import default_model
from serve_app.ports import free_ports

MODEL_NAME = "bench"
NUM_REPLICAS = 3
NUM_TENANTS = 24
TENANT_TOKENS = 640  # of the text that a tenant's prompts begin with
BLOCK_SIZE = 16
NUM_BLOCKS = NUM_TENANTS // 2 * TENANT_TOKENS // BLOCK_SIZE
ANSWER_TOKENS = 8
CLIENTS = 6
WARM_UP, MEASURED = 500, 700  # requests: about 15 and 20 s, many exchanges of the directory
SETTLE_S = 6.0  # until a first replica has noticed that it is not alone

COLUMNS = ["routing", "prompt tokens found cached", "TTFT p50, ms", "TTFT p95, ms", "requests/s"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing")
    parser.add_argument("--quick", action="store_true", help="few requests, nothing written")
    args = parser.parse_args()
    prompts = _prompts()
    rows: list[list[str | float]] = []
    for name, routed in [("Serve's choice", False), ("cache-aware", True)]:
        with _server(routed) as url:
            rows.append([name, *asyncio.run(_measure(url, prompts, quick=args.quick))])
    table = Table(
        title=f"{NUM_TENANTS} tenants of {TENANT_TOKENS} tokens each, {NUM_REPLICAS} replicas",
        columns=COLUMNS,
        rows=rows,
        notes=[
            f"Each replica's cache holds {NUM_BLOCKS * BLOCK_SIZE} tokens, the tenants' texts are "
            f"{NUM_TENANTS * TENANT_TOKENS}. {CLIENTS} requests at once, {ANSWER_TOKENS} tokens "
            f"each, {MEASURED} of them after {WARM_UP}; the order is the same in both runs. "
            "Load generator and replicas share the machine's cores."
        ],
    )
    show(table)
    if not args.quick:
        print(save("routing", "Cache-aware routing", [table]))


def _prompts() -> list[str]:
    """One text per tenant, different from its first words on."""
    tokenizer = Tokenizer.load(default_model())
    texts = []
    for tenant in range(NUM_TENANTS):
        words = random.Random(tenant)
        text = f"You answer for shop {tenant * 37 % 101}."
        while len(tokenizer.encode(text, False)) < TENANT_TOKENS:
            text += f" Article {words.randrange(1000)} costs {words.randrange(100)} coins."
        texts.append(text)
    return texts


async def _measure(url: str, prompts: list[str], *, quick: bool) -> list[str | float]:
    """Share of prompt tokens found, TTFT in ms (p50, p95), requests per second."""
    await asyncio.sleep(SETTLE_S)
    rng = random.Random(1)
    num_warm, num_measured = (500, 400) if quick else (WARM_UP, MEASURED)
    tenants = [rng.randrange(NUM_TENANTS) for _ in range(num_warm + num_measured)]
    waiting = iter(enumerate(tenants))
    replies: list[tuple[int, Reply]] = []

    async def client() -> None:
        connection = Connection(url)
        for index, tenant in waiting:
            body = _body(prompts[tenant], index)
            replies.append((index, await connection.post("/v1/chat/completions", body)))
        connection.close()

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    measured = [reply for index, reply in replies if index >= num_warm]
    first_ms = [reply.first * 1000 for reply in measured]
    found = sum(reply.num_cached_tokens for reply in measured)
    asked = sum(reply.num_prompt_tokens for reply in measured)
    seconds = max(r.arrivals[-1] for r in measured) - min(r.sent for r in measured)
    return [
        f"{found / asked:.0%}",
        statistics.median(first_ms),
        statistics.quantiles(first_ms, n=20)[18],
        len(measured) / seconds,
    ]


def _body(text: str, index: int) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": f"Question {index}: what is {index} + 1?"},
        ],
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextmanager
def _server(routed: bool) -> Iterator[str]:
    (port,) = free_ports(1)
    engine = {
        "model": default_model(),
        "block_size": BLOCK_SIZE,
        "cache_max_entry_count": NUM_BLOCKS,
        "max_num_batched_tokens": 512,
        "num_threads": 1,
    }
    args = {"engine": engine, "model_name": MODEL_NAME, "cache_aware_routing": routed}
    app: dict[str, Any] = {"name": "bench", "import_path": "serve_app.app:build_app", "args": args}
    app["deployments"] = [{"name": "LLMReplica", "num_replicas": NUM_REPLICAS}]
    url = f"http://127.0.0.1:{port}"
    command = [MANTA, "serve", "--port", str(port)]
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "serve_config.yaml").write_text(yaml.dump({"applications": [app]}))
        # So many answers that none of the requests meets a replica that starts.
        with running(command, url, num_answers=3 * NUM_REPLICAS, cwd=directory):
            yield url


if __name__ == "__main__":
    main()
