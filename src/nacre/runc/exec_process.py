"""The OCI process that `nacre-runc exec` asks for."""

from __future__ import annotations

from nacre.oci import state as store
from nacre.oci.errors import Invalid
from nacre.oci.spec import parse

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


def build(root: str, identifier: str, chosen: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """From --process, or the container's own with what the options change. `words` are those after the id. Raises Invalid."""
    if "process" in chosen:
        with open(chosen["process"], "rb") as file:
            return dict(parse(file.read(), f"read {chosen['process']}"))
    record = store.read(root, identifier)
    tree: dict[str, Any] = store.kept_process(record)
    command = words[1:] if words[:1] == ["--"] else words
    if not command:
        raise Invalid(what=f"execute in container {identifier}", cause="there is no command after the id")
    tree |= {"args": list(command), "terminal": chosen.get("tty", False), "env": [*tree.get("env", ()), *chosen.get("env", ())]}
    if "cwd" in chosen:
        tree["cwd"] = chosen["cwd"]
    if chosen.get("no-new-privs"):
        tree["noNewPrivileges"] = True
    if "apparmor" in chosen:
        tree["apparmorProfile"] = chosen["apparmor"]
    if "process-label" in chosen:
        tree["selinuxLabel"] = chosen["process-label"]
    user = dict(tree.get("user", {}))
    if "user" in chosen:
        user |= _numeric_user(chosen["user"])
    if "additional-gids" in chosen:
        user["additionalGids"] = [
            *user.get("additionalGids", ()),
            *(_number(word, "--additional-gids") for word in chosen["additional-gids"]),
        ]
    capabilities = {kind: list(names) for kind, names in tree.get("capabilities", {}).items()}
    kinds = ["bounding", "effective", "permitted"]  # never inheritable: CVE-2022-29162
    if capabilities.get("inheritable"):
        kinds.append("ambient")  # what is inheritable already may be kept by a program without capabilities of its own
    for name in chosen.get("cap", ()):
        for kind in kinds:
            capabilities.setdefault(kind, []).append(name)
    return tree | {"user": user, "capabilities": capabilities}


def _numeric_user(text: str) -> dict[str, int]:
    uid, _, gid = text.partition(":")
    return {"uid": _number(uid, "--user")} | ({"gid": _number(gid, "--user")} if gid else {})


def _number(word: str, option: str) -> int:
    if not word.isdecimal():
        raise Invalid(
            what="read the options",
            cause=f"{option} is {word!r}, not a number",
            remedy="a runtime takes ids, engines look up names",
        )
    return int(word)
