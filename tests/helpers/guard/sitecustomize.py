"""Put on a process's path, this refuses every socket that leads off the machine, whatever the process imports."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any


def _refuse(address: Any) -> None:
    if not isinstance(address, tuple):  # a file system's socket
        return
    host = str(address[0])
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    if not inside:
        raise AssertionError(f"a connection off this machine was tried: {host}")


def _guarded(name: str, position: int) -> Callable[..., Any]:
    original = getattr(socket.socket, name)

    def checked(self: socket.socket, *args: Any) -> Any:
        _refuse(args[position])
        return original(self, *args)

    return checked


def _guarded_lookup(original: Callable[..., Any]) -> Callable[..., Any]:
    def checked(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse((host.decode() if isinstance(host, bytes) else host or "127.0.0.1",))
        return original(host, *args, **kwargs)

    return checked


def guards() -> list[tuple[Any, str, Callable[..., Any]]]:
    """What to replace: object, name of the attribute, the guarded function."""
    return [
        (socket.socket, "connect", _guarded("connect", 0)),
        (socket.socket, "connect_ex", _guarded("connect_ex", 0)),
        (socket.socket, "sendto", _guarded("sendto", -1)),
        (socket, "getaddrinfo", _guarded_lookup(socket.getaddrinfo)),
    ]


if __name__ == "sitecustomize":  # not where tests import it
    for owner, attribute, guarded in guards():
        setattr(owner, attribute, guarded)
