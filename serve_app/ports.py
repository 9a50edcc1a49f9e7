"""TCP ports of this machine: free ones, and who listens on one that is not."""

import errno
import os
import socket
from pathlib import Path

from engine.errors import ConfigError

LISTEN = "0A"  # the state's number in /proc/net/tcp


def free_ports(count: int) -> list[int]:
    """Different ports nobody listens on now, on any interface."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def check_port(host: str, port: int) -> None:
    """ConfigError when somebody listens there, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            who = listener(port) if error.errno == errno.EADDRINUSE else None
            reason = f"{who} listens there" if who else error.strerror or str(error)
            raise ConfigError(
                f"cannot listen on {host} port {port}: {reason}; choose another with --port "
                "(0 takes any free one) or --host"
            ) from error


def listener(port: int) -> str | None:
    """The process that listens on a port, as `name (pid 123)`, if it is one of this user's."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        try:
            if any(os.readlink(each) in sockets for each in (process / "fd").iterdir()):
                name = (process / "comm").read_text().strip()
                return f"{name} (pid {process.name})"
        except OSError:  # gone, or another user's
            continue
    return None


def _listening_inodes(port: int) -> list[str]:
    """Columns of /proc/net/tcp: 1 local address, 3 state, 9 inode."""
    inodes = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for columns in map(str.split, lines):
            if columns[3] == LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.append(columns[9])
    return inodes
