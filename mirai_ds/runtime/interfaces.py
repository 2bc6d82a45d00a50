"""The network interface through which ranks of several nodes talk over gloo.

gloo takes the address of the host's own name.  Debian and Ubuntu put `127.0.1.1 HOSTNAME` into /etc/hosts: each node
then tells the others to find it at their own loopback, and nobody meets.  NCCL chooses an interface by itself.
"""

from __future__ import annotations

import ipaddress
import os
import socket

VARIABLE = "GLOO_SOCKET_IFNAME"
_ANYWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737): asked for a route only, nothing is sent


def choose_gloo_interface(master: str) -> str | None:
    """Set GLOO_SOCKET_IFNAME where this host's name leads to itself only, unless it is set; returns what it now is.

    master: name or address of rank 0's node.  On other nodes it is the interface that leads there, on rank 0's own the
    one that leads out, or the only one there is.  Else nothing is set, and gloo says that it cannot connect.
    """
    if VARIABLE in os.environ or not _is_loopback(socket.gethostname()):
        return None
    interface = _interface_to(master) or _interface_to(_ANYWHERE)
    if interface is None and len(others := _addresses()) == 1:
        (interface,) = others
    if interface is not None:
        os.environ[VARIABLE] = interface
    return interface


def _is_loopback(host: str) -> bool:
    """Whether a host name has an address of this machine only, or none at all, which gloo treats alike."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return True


def _interface_to(host: str) -> str | None:
    """Name of the interface that packets to `host` leave through, if they leave this machine."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # a datagram socket only looks up the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for name, addresses in _addresses().items() if own in addresses), None)


def _addresses() -> dict[str, list[str]]:
    """IPv4 addresses of each interface that is up and has one, loopback aside."""
    import psutil

    states = psutil.net_if_stats()
    up = {name for name in states if states[name].isup}
    by_name = {
        name: [a.address for a in addresses if a.family == socket.AF_INET and not a.address.startswith("127.")]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: addresses for name, addresses in by_name.items() if addresses}
