"""Addresses of this machine: where a process is reached, and ports nobody uses."""

import socket

LOOPBACKS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # of the wildcard addresses
# Documentation addresses (RFC 5737, RFC 3849): routed like any other, and connecting a datagram socket sends nothing.
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reachable_host(bind_host: str) -> str:
    """Where other processes reach what binds to `bind_host`: for a wildcard, the address this machine sends from.

    Without a route to elsewhere that is the loopback address.
    """
    if bind_host not in LOOPBACKS:
        return bind_host
    with socket.socket(_family(bind_host), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE[_family(bind_host)], 9))
            return str(probe.getsockname()[0])
        except OSError:
            return loopback_host(bind_host)


def loopback_host(bind_host: str) -> str:
    """Where processes of this machine reach what binds to `bind_host`."""
    return LOOPBACKS.get(bind_host, bind_host)


def free_port(host: str) -> int:
    """A port that was free a moment ago; whoever binds it fails in the rare case that it is taken by then."""
    with socket.create_server((host, 0), family=_family(host)) as server:
        return int(server.getsockname()[1])
