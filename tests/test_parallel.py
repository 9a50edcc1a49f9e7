"""Where ranks meet: IPv4 and IPv6, the right interface, and an end to waiting."""

import os
import socket

import pytest

from engine import parallel
from engine.errors import EngineDeadError
from engine.parallel import ParallelGroup, choose_interface, listen


def _has_ipv6() -> bool:
    try:
        listen("::1").close()
    except OSError:
        return False
    return True


HAS_IPV6 = _has_ipv6()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")),
    ],
)
def test_a_free_port_of_either_family(host: str) -> None:
    with listen(host) as one, listen(host) as other:
        assert one.getsockname()[0] == host
        assert one.getsockname()[1] != other.getsockname()[1]
        socket.create_connection(one.getsockname()[:2], timeout=5).close()


def test_the_interface_is_the_one_that_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


def test_every_address_of_this_machine_has_its_interface() -> None:
    found = {parallel._interface(parallel._own_address("127.0.0.1"))}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no network")
        address = probe.getsockname()[0]
    found.add(parallel._interface(address))
    assert found <= {name for _, name in socket.if_nameindex()}
    assert parallel._interface("192.0.2.1") is None  # nobody's: RFC 5737


def test_a_rank_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MEET_S", 1)
    with listen("127.0.0.1") as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(EngineDeadError, match=f"rank 0 of 2 waited 1 s at {address}"):
            ParallelGroup.join(0, 2, address, "cpu", listener=listener)
