"""The hosts of a job, as the environment names them: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from dataclasses import dataclass, replace

from rqvae.errors import BadInput

RESTARTS = "RQVAE_MAX_RESTARTS"
"""How often the processes are started anew, from the newest checkpoint, after one of them died; 0 by default."""
PATIENCE = "RQVAE_HOSTS_TIMEOUT"
"""Seconds that a host waits for the others, at the start and after one was lost; 600 by default."""
OWN_ADDRESS = "RQVAE_HOST_ADDR"
"""This host's address as the others reach it; by default that of the interface which leads to MASTER_ADDR."""

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Hosts:
    """Which hosts take part, and which of them this is.

    Args:
        count: of hosts.
        rank: this host's number; host 0 is MASTER_ADDR, and keeps what the hosts agree on.
        address: of host 0.
        port: of host 0 that the hosts meet at; 0 is any free one, for a job of one host.
        own_address: of this host, as the others reach it.
        restarts: how often this host's processes are started anew.
        patience: seconds to wait for other hosts.
    """

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    own_address: str = "127.0.0.1"
    restarts: int = 0
    patience: float = 600.0

    @classmethod
    def from_environment(cls) -> Hosts:
        """What the environment says; one host where NNODES is not set or 1.

        Raises:
            BadInput: a variable is missing, or is no number, or out of its range.
        """
        count, restarts = host_count(), max_restarts()
        if count == 1:
            return cls(restarts=restarts)
        rank, port = _number("NODE_RANK", 0, count - 1), _number("MASTER_PORT", 1, 65535)
        address = os.environ.get("MASTER_ADDR", "")
        if not address:
            raise BadInput(f"MASTER_ADDR: expected the address of host 0 with NNODES {count}, it is not set")
        patience = _number(PATIENCE, 1, 10**6, default=600)
        return cls(count, rank, address, port, "", restarts, patience)

    def reach(self) -> Hosts:
        """Wait until host 0 answers, which host 0 itself does not wait for; the same hosts with `own_address`.

        Raises:
            BadInput: nobody answered for `patience` seconds, or another program has MASTER_PORT of host 0.
        """
        if self.count == 1:
            return self
        if self.rank == 0:
            self._check_port_is_free()
        own = os.environ.get(OWN_ADDRESS)
        return replace(self, own_address=own or (self._wait_for_host_0() if self.rank else self.address))

    def _wait_for_host_0(self) -> str:
        """This host's address on the way there."""
        end = time.monotonic() + self.patience
        while True:
            try:
                with socket.create_connection((self.address, self.port), timeout=min(self.patience, 5.0)) as found:
                    return str(found.getsockname()[0])
            except OSError as error:  # a name that is not known yet too: the resolver may hear of host 0 later
                if time.monotonic() > end:
                    raise BadInput(
                        f"MASTER_ADDR {self.address}, MASTER_PORT {self.port}: expected host 0 to answer within "
                        f"{self.patience:g} s, got: {error.strerror or error}"
                    ) from error
            time.sleep(0.5)

    def _check_port_is_free(self) -> None:
        """Raise BadInput on host 0 where another program has MASTER_PORT."""
        with socket.socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", self.port))
            except OSError as error:
                raise BadInput(
                    f"MASTER_PORT {self.port}: expected a free port on host 0, got: {error.strerror}"
                ) from error


def host_count() -> int:
    """NNODES; 1 where it is not set."""
    return _number("NNODES", 1, 10**5, default=1)


def max_restarts() -> int:
    """RQVAE_MAX_RESTARTS; 0 where it is not set."""
    return _number(RESTARTS, 0, 10**6, default=0)


def use_interface_to(peer: str) -> None:
    """Have gloo use the interface that leads to another host; a choice that the user has made stays.

    By itself it takes the one that the host's name stands for, which on Debian is 127.0.1.1: others cannot reach that.

    Args:
        peer: address of the other host.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or ":" in peer:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # of datagrams: asks for the way and sends nothing
        name = _interface_with(probe.getsockname()[0])
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface_with(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address (Linux, netdevice(7)); None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(any_socket, _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None


def _number(name: str, least: int, most: int, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdigit() or not least <= int(text) <= most:
        raise BadInput(f"{name}: expected a whole number from {least} to {most}, got {text or 'nothing'}")
    return int(text)
