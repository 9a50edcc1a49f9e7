"""The real application over a StubExecutor, started as `manta serve` starts it.

    python -m benchmarks.stub_server haproxy 8000    (or: default)

Two apps: / answers at once, /paced takes 10 ms for every step.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.stub_executor import STEP_MS
from engine.errors import MantaError
from serve_app import launch_env
from serve_app.launch_plan import LaunchPlan, make_plan
from serve_app.processes import Guard

PACED_STEP_MS = 10.0
DEFAULT_PROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
}


def main(proxy: str, port: int) -> None:
    started = time.monotonic()
    if proxy == "default":
        os.environ.update(DEFAULT_PROXY)
    with Guard() as guard:
        launch_env.set_local_defaults(os.environ, guard.run_dir, verbose=False)
        from serve_app import launch

        plan = stub_plan(port)
        launch.run(plan, address=None, dashboard=False, verbose=False, started=started)


def stub_plan(port: int) -> LaunchPlan:
    """The plan of `manta serve`, with its app twice and stubs in the engine's processes."""
    plan = make_plan(port=port, max_num_seqs=256)
    (app,) = plan.serve_config["applications"]
    plan.serve_config["applications"] = [
        _stub_app(app, app["name"], "/", 0.0),
        _stub_app(app, "paced", "/paced", PACED_STEP_MS),
    ]
    return plan


def _stub_app(app: dict[str, Any], name: str, route_prefix: str, step_ms: float) -> dict[str, Any]:
    site, root = Path(__file__).parent / "stub_site", Path(__file__).parents[1]
    runtime_env = {"env_vars": {STEP_MS: str(step_ms), "PYTHONPATH": f"{site}:{root}"}}
    return app | {"name": name, "route_prefix": route_prefix, "runtime_env": runtime_env}


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except MantaError as error:
        sys.exit(str(error))
