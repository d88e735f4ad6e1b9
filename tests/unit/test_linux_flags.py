"""Families of flags behave as enum's do, where they are used; sockets as the module socket's."""

from __future__ import annotations

import enum
import os

import pytest

from nacre.linux import sockets
from nacre.linux.mounts import MountAttr, MountFlag
from nacre.linux.namespaces import Clone


@pytest.mark.parametrize("family", [MountFlag, MountAttr, Clone])
def test_a_family_answers_as_enum_would(family: type[enum.IntFlag]) -> None:
    members = {name: int(value) for name, value in vars(family).items() if name.isupper()}
    assert len(members) > 5
    twin = enum.IntFlag("twin", members)
    for name, value in members.items():
        mine, other = getattr(family, name), twin[name]
        assert type(mine) is family and mine == value == family(value)
        assert (mine | 1, mine & 3, mine ^ 5, 7 & ~mine) == (other | 1, other & 3, other ^ 5, 7 & int(~other))
        assert mine.name == other.name and bool(mine) is bool(other)
        assert type(mine | 1) is type(1 | mine) is type(mine & 1) is type(~mine) is family


def test_what_is_made_of_members_is_called_by_their_names() -> None:
    assert (MountFlag.RDONLY | MountFlag.NOSUID).name == "RDONLY|NOSUID"
    assert repr(MountFlag.RDONLY) == "MountFlag.RDONLY" and repr(MountFlag(0)) == "MountFlag(0)"
    assert MountFlag(1 << 40).name is None


def test_descriptors_travel_over_a_pair_and_blocks_close_it() -> None:
    near, far = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    with near, far:
        assert not os.get_inheritable(near.fileno())
        sockets.send_fds(near, [b"x"], [0, 1])
        data, descriptors, _, _ = sockets.recv_fds(far, 1, 2, sockets.MSG_CMSG_CLOEXEC)
        assert data == b"x" and [os.path.sameopenfile(a, b) for a, b in zip(descriptors, (0, 1), strict=True)] == [True, True]
        for fd in descriptors:
            os.close(fd)
    assert near.fileno() == far.fileno() == -1


def test_an_accepted_connection_is_closed_by_its_block(tmp_path: os.PathLike[str]) -> None:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as listener:
        listener.bind(f"{tmp_path}/s")
        listener.listen(1)
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as caller:
            caller.connect(f"{tmp_path}/s")
            accepted, _ = listener.accept()
            with accepted:
                caller.sendall(b"hello")
                assert accepted.recv(9) == b"hello" and not os.get_inheritable(accepted.fileno())
        assert accepted.fileno() == -1
