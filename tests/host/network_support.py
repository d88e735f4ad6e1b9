"""Networks for tests: a network namespace for the "host" of a test, more of them for pods, and sockets inside any of them."""

from __future__ import annotations

import functools
import os
import pickle
import signal
import socket
import struct
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nacre.linux import links
from nacre.linux.namespaces import Clone, unshare
from nacre.linux.netlink import entered


def own_network(test: Callable[..., None]) -> Callable[..., None]:
    """The test runs in a forked child with a network namespace of its own, loopback up, forwarding off: the host stays untouched."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os._exit(_child(write, functools.partial(test, *args, **kwargs)))
        os.close(write)
        with open(read, "rb") as file:
            data = file.read()
        _pid, status = os.waitpid(pid, 0)
        outcome, words = pickle.loads(data) if data else ("failed", f"the child ended with wait status {status}")
        if outcome == "skipped":
            pytest.skip(words)
        assert outcome == "passed", words

    return run


def _child(write: int, test: Callable[[], None]) -> int:
    try:
        unshare(Clone.NEWNET)
        links.lo_up()
        with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
            file.write("0")
        test()
        outcome = ("passed", "")
    except pytest.skip.Exception as skipped:
        outcome = ("skipped", str(skipped))
    except BaseException:
        outcome = ("failed", traceback.format_exc())
    os.write(write, pickle.dumps(outcome))
    return 0


class Namespace:
    """A network namespace held by a sleeping child."""

    def __init__(self) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            unshare(Clone.NEWNET)
            os.write(write, b"x")
            os.close(write)
            signal.pause()
            os._exit(0)
        os.close(write)
        assert os.read(read, 1) == b"x"
        os.close(read)
        self.path = f"/proc/{self.pid}/ns/net"
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.fd)
            self.pid = 0

    def socket(self, *args: Any) -> socket.socket:
        """A socket that lives in this namespace, with a deadline so that no test hangs."""
        with entered(self.fd):
            made = socket.socket(*args)
        made.settimeout(3)
        return made

    def run(self, *command: str) -> str:
        """Output of a command run inside."""
        return output("nsenter", f"--net={self.path}", *command)


@contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    made = [Namespace() for _ in range(count)]
    try:
        yield made
    finally:
        for namespace in made:
            namespace.end()


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tcp_server(made: socket.socket, address: str, port: int, count: int = 1) -> threading.Thread:
    """Answer `count` connections with the peer's address as this side sees it."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    made.listen()

    def serve() -> None:
        for _ in range(count):
            connection, peer = made.accept()
            with connection:
                connection.sendall(peer[0].encode())

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def ask(made: socket.socket, address: str, port: int) -> str:
    """What tcp_server says: who it thinks we are."""
    with made:
        made.connect((address, port))
        return made.recv(100).decode()


def host_socket(*args: Any) -> socket.socket:
    made = socket.socket(*args)
    made.settimeout(3)
    return made


def checksum(data: bytes) -> int:
    """RFC 1071."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source: bytes, target: bytes, protocol: int, payload: bytes) -> bytes:
    """A packet with a right header checksum."""
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, protocol, 0, source, target)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload
