"""`python -m tests.chaos --minutes 10 --seed 1`: a JSON summary, and exit code 1 for any loss.

--faults scale,redeploy   these, once each, in place of all at random for some minutes
--proxy python            Serve's own proxy in place of HAProxy
--save                    the summary's numbers into benchmarks/results/chaos.json
"""

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import Table, save
from serve_app import launch_env
from serve_app.processes import Guard


def main() -> int:
    args = _arguments()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = str(int(args.proxy == "haproxy"))
    with tempfile.TemporaryDirectory(prefix="manta-chaos-") as directory, Guard() as guard:
        os.environ["XDG_CACHE_HOME"] = directory
        launch_env.set_local_defaults(os.environ, guard.run_dir, verbose=False)
        summary = asyncio.run(_run(args, Path(directory), guard.run_dir))
    print(json.dumps(summary, indent=1))
    if args.save:
        print(save("chaos", "Chaos", [table(summary)]))
    return 0 if summary["clean"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--placement", choices=["node", "ranks"], default="node")
    parser.add_argument("--faults", default="", help="their names, instead of chance")
    parser.add_argument("--proxy", choices=["haproxy", "python"], default="haproxy")
    parser.add_argument("--save", action="store_true")
    return parser.parse_args()


def table(summary: dict[str, Any]) -> Table:
    rows: list[list[str | float]] = []
    for name, value in summary.items():
        if isinstance(value, bool):
            rows.append([name, "yes" if value else "no"])
        elif name != "faults":
            rows.append([name, len(value) if isinstance(value, list | str) else value])
    happened = Counter(
        re.sub(r"^[\d.]+ s: | \d.*", "", fault.split(",")[0]) for fault in summary["faults"]
    )
    rows += [[f"faults: {name}", number] for name, number in happened.most_common()]
    return Table("Faults at random under clients that compare every token", ["", ""], rows)


async def _run(args: argparse.Namespace, directory: Path, run_dir: Path) -> dict[str, Any]:
    # Not at the top: Ray reads the environment that main has set.
    from serve_app.async_engine import BLAME_DEATHS
    from tests.chaos.faults import FAULTS, KILLING
    from tests.chaos.load import Load, make_bodies
    from tests.chaos.site import NotRecoveredError, Site
    from tests.tiny_models import write_servable_model

    checkpoint = directory / "tiny-llama"
    write_servable_model("llama", checkpoint, max_position_embeddings=512)
    rng = random.Random(args.seed)
    site = Site(checkpoint, run_dir, num_nodes=args.nodes, tp=args.tp, placement=args.placement)
    await site.recovered()
    load = Load(site.url, make_bodies("tiny", 12, max_tokens=300), args.clients)
    await load.ask_oracle()
    asking = asyncio.ensure_future(load.run(rng))
    await asyncio.sleep(1)  # until streams are open
    happened: list[str] = []
    num_killed = 0  # faults that end an engine
    started = time.monotonic()
    failure = ""
    for name in _names(args, rng, sorted(FAULTS)):
        what = await FAULTS[name](site, load, rng)
        num_killed += name in KILLING
        since = time.monotonic()
        await asyncio.sleep(rng.uniform(0.3, 2))  # sometimes before anybody has noticed
        try:
            await site.recovered()
        except NotRecoveredError as error:
            failure = str(error)
            break
        happened.append(f"{since - started:.1f} s: {what}, {time.monotonic() - since:.1f} s")
        print(happened[-1], load.count.complete, file=sys.stderr, flush=True)
    load.stop()
    await asking
    await load.close()
    await asyncio.sleep(1)  # the engines' last reports
    leaks = await asyncio.to_thread(site.leaks)
    left = await asyncio.to_thread(site.close)
    count = load.count
    return {
        "clean": count.complete > 0
        and count.blamed * BLAME_DEATHS <= num_killed
        and not (failure or count.wrong or count.lost or leaks or left),
        "seconds": round(time.monotonic() - started),
        "complete": count.complete,
        "resumed": count.resumed,
        "streams refused": count.refused,
        "whole answers refused": count.refused_whole,
        "asked again after the proxy's death": count.entrance,
        "blamed for the death of engines": count.blamed,
        "wrong": count.wrong,
        "lost": count.lost,
        "leaks": leaks,
        "left behind": left,
        "not recovered": [failure] if failure else [],
        "faults": happened,
    }


def _names(args: argparse.Namespace, rng: random.Random, known: list[str]) -> Iterator[str]:
    if args.faults:
        yield from args.faults.split(",")
        return
    deadline = time.monotonic() + 60 * args.minutes
    while time.monotonic() < deadline:
        yield rng.choice(known)


if __name__ == "__main__":
    sys.exit(main())
