"""Who a container runs as: `config.User` or the CRI's run_as_username, looked up in the image's own passwd and group.

Forms (OCI image spec, config.md "User"): "", "user", "uid", "user:group", "uid:gid", "uid:group", "user:gid". Read beneath the layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from nacre.images.errors import UserNotFound
from nacre.images.merged import View
from nacre.images.model import User
from nacre.oci.errors import Failure

_FILE_LIMIT = 4 << 20
_ID_LIMIT = (1 << 32) - 1


def resolve(view: View, image: str, spec: str) -> User:
    """The user that `spec` names in the image. Raises UserNotFound; a number needs no entry.

    Supplementary groups are those that the group file gives the user's name; with an explicit group there are none.
    """
    what = f'find user "{spec}" in image {image}'
    name, colon, group = spec.partition(":")
    uid, gid, login = _user(view, what, name or "0")
    if colon and group:
        return User(uid, _group(view, what, group))
    groups = {int(row[2]) for row in _rows(view, what, "etc/group", 4) if login and login in row[3].split(",")}
    return User(uid, gid, tuple(sorted(groups - {gid})))


def _user(view: View, what: str, name: str) -> tuple[int, int, str]:
    """(uid, gid, login name or "")."""
    number = _number(name)
    for row in _rows(view, what, "etc/passwd", 7):
        if (row[0] == name if number is None else int(row[2]) == number) and row[3].isdigit():
            return int(row[2]), int(row[3]), row[0]
    if number is None:
        raise UserNotFound(
            what=what,
            cause=f"unable to find user {name}: no matching entries in passwd file",
            remedy="set securityContext.runAsUser to a number, or use an image whose /etc/passwd has the name",
        )
    return number, 0, ""


def _group(view: View, what: str, name: str) -> int:
    number = _number(name)
    if number is not None:
        return number
    for row in _rows(view, what, "etc/group", 4):
        if row[0] == name:
            return int(row[2])
    raise UserNotFound(
        what=what,
        cause=f"unable to find group {name}: no matching entries in group file",
        remedy="set securityContext.runAsGroup to a number",
    )


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < _ID_LIMIT else None


def _rows(view: View, what: str, path: str, fields: int) -> Iterator[list[str]]:
    """Lines of passwd(5) or group(5) with a sane number in the third field; anything else in the file is passed over."""
    try:
        data = view.read(path, _FILE_LIMIT)
    except OSError as error:
        raise Failure(what=what, cause=f"/{path} of the image cannot be read: {error.strerror}") from error
    for line in (data or b"").decode("utf-8", "replace").splitlines():
        row = line.strip().split(":")
        if len(row) >= fields and _number(row[2]) is not None:
            yield row
