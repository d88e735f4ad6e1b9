"""Sockets for what starts often: the module `socket` to type checkers, at run time as much of it as is used here.

`socket` turns its constants into enumerations when it is loaded and brings selectors along: 8 ms of every command. Imported as
`from nacre.linux import sockets as socket`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from socket import *  # noqa: F403
    from socket import recv_fds as recv_fds
    from socket import send_fds as send_fds
else:
    import _socket
    from _socket import *  # noqa: F403
    from sys import byteorder

    _INT = 4  # bytes of a descriptor in a message; the module array would bring collections along

    class socket(_socket.socket):
        """Closed at the end of a `with` block; accepting gives one like it."""

        __slots__ = ()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def accept(self):
            fd, address = self._accept()
            return socket(self.family, self.type, self.proto, fileno=fd), address

    def socketpair(family, kind):
        return tuple(socket(family, kind, 0, one.detach()) for one in _socket.socketpair(family, kind))

    def send_fds(channel, buffers, descriptors):
        rights = b"".join(fd.to_bytes(_INT, byteorder) for fd in descriptors)
        return channel.sendmsg(buffers, [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])

    def recv_fds(channel, size, most, flags=0):
        """(data, descriptors, message flags, address)."""
        descriptors = []
        data, ancillary, told, address = channel.recvmsg(size, _socket.CMSG_LEN(most * _INT), flags)
        for level, kind, content in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                places = range(0, len(content) - _INT + 1, _INT)
                descriptors += [int.from_bytes(content[place : place + _INT], byteorder) for place in places]
        return data, descriptors, told, address
