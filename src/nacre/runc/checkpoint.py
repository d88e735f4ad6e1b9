"""Containers frozen to disk and taken up again by CRIU (criu(8)), where it is installed.

CRIU walks the processes of the container by itself; what it cannot know is told on its command line: which mounts, descriptors and
namespaces come from outside. Beside its images lies

    IMAGES/descriptors.json    what stdin, stdout and stderr were, in the words by which CRIU takes others in their place

and while it restores a container with hooks, in its work directory

    WORK/ID.hooks          a script that CRIU runs once the namespaces are there: it writes the pid to one pipe and reads its own
    WORK/ID.asked          status from the other; in between prestart and createRuntime hooks are run, as runc runs them then
    WORK/ID.answer

Cgroups are not CRIU's: `restore` makes them as config.json has them and starts CRIU inside, so that what it makes is born there.
Its log is kept in the work directory, and the lines of it that tell an error are the evidence of a failure.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from nacre.linux import cgroups, mounts, namespaces, process
from nacre.linux.libc import owned
from nacre.linux.memfd import from_bytes
from nacre.linux.mounts import MountFlag
from nacre.linux.namespaces import Clone
from nacre.oci import spec as oci_spec
from nacre.oci import state as store
from nacre.oci.errors import EVIDENCE_LINES, Failure, Invalid, Unsupported, WrongStatus
from nacre.oci.state import Record, Status, advance
from nacre.runc import container, hooks, life, plan
from nacre.runc.failures import HookFailed

TYPE_CHECKING = False  # see oci.values
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Options = Mapping[str, Any]

_MODES = ("soft", "full", "strict", "ignore")
_FLAGS = ("tcp-established", "ext-unix-sk", "shell-job", "file-locks", "auto-dedup", "lazy-pages")
_DUMP_FLAGS = (*_FLAGS, "leave-running", "link-remap", "tcp-skip-in-flight")
_JOINED = {"network": "net", "pid": "pid"}  # namespaces that CRIU can take from outside, and its words for them
_CONFIG = "/etc/criu/runc.conf"
_FIRST_INHERITED = 100  # beyond what the command has open


class CriuFailed(Failure):
    """CRIU could not freeze or restore the container; the evidence is from its log."""


def checkpoint(root: str, identifier: str, options: Options) -> None:
    """Write the container to the directory `image-path`, and end and delete it unless it is to go on (`leave-running`, `pre-dump`)."""
    what = f"checkpoint container {identifier}"
    criu = _criu(what, options)
    with store.locked(root, identifier):
        record = store.read(root, identifier)
        status = life.current_status(record)
        if status != Status.RUNNING:
            raise WrongStatus(what=what, cause=f"it is {status}", remedy="a container is checkpointed while it runs")
        _refuse(record, store.kept_process(record), what)
        images, work = _directories(options)
        inherited = [_descriptor(record.pid, number) for number in range(3)]
        _run(what, [criu, *dump_words(record, options, images, work, inherited, _freezer(record))], work, "dump.log")
        if not options.get("pre-dump"):
            with open(os.path.join(images, "descriptors.json"), "w", encoding="utf-8") as file:
                json.dump(inherited, file)
    if not (options.get("pre-dump") or options.get("leave-running")):
        life.delete(root, identifier, force=True)


def restore(root: str, identifier: str, bundle: str, options: Options, *, systemd_cgroup: bool = False) -> int:
    """Make a container of BUNDLE from the images; it runs when this returns. Answers the pid of its init, a child of nobody here."""
    what = f"restore container {identifier}"
    oci_spec.check_id(identifier)
    criu = _criu(what, options)
    images, work = _directories(options)
    bundle = os.path.abspath(bundle)
    spec = oci_spec.load(bundle)
    if "process" not in spec:
        raise Invalid(what=what, cause="config.json has no process")
    plan.refuse_unsupported(spec)
    layout = cgroups.discover()
    record = container.first_record(root, identifier, bundle, spec, layout, systemd_cgroup)
    _refuse(record, spec["process"], what)
    try:
        return _revived(what, criu, record, spec, options, (images, work), layout)
    except HookFailed as failure:
        container.after_failed_hook(failure, record)
        raise


def _revived(
    what: str,
    criu: str,
    record: Record,
    spec: Mapping[str, Any],
    options: Options,
    places: tuple[str, str],
    layout: cgroups.Layout,
) -> int:
    root, identifier, (images, work) = record.root, record.id, places
    with ExitStack() as undo:
        lock = store.reserve(root, identifier)
        undo.callback(life.remove_directory, root, identifier)
        with owned(lock):
            store.save(record)
            store.keep_process(record, spec["process"])
            record = container.with_filter(record, spec, "")
            cgroup = life.cgroup_of(record, layout=layout)
            container.make_cgroup(cgroup, spec, undo)
            words = restore_words(record, options, images, work, _kept(images, what))
            pid = _restored(what, [criu, *words], record, cgroup, work, spec.get("hooks", {}))
            found = process.status(pid)
            record = advance(record, Status.CREATED, pid=pid, start_time=found[2] if found else 0, created_ns=time.time_ns())
            advance(record, Status.RUNNING)
            if cgroup is not None:
                cgroup.settle()
        undo.pop_all()
    return pid


# -- what CRIU is told


def dump_words(record: Record, options: Options, images: str, work: str, inherited: Sequence[str], freezer: str) -> list[str]:
    """criu's arguments to freeze the container."""
    words = ["pre-dump" if options.get("pre-dump") else "dump", "--tree", str(record.pid)]
    words += [*_places(images, work), "--log-file", "dump.log", *_configured(record), *_common(options, _DUMP_FLAGS)]
    words += ["--manage-cgroups=" + options.get("manage-cgroups-mode", "soft")]
    words += ["--freeze-cgroup", freezer] if freezer else []
    words += ["--track-mem"] if options.get("pre-dump") else []
    words += ["--prev-images-dir", options["parent-path"]] if "parent-path" in options else []
    words += ["--status-fd", str(options["status-fd"])] if "status-fd" in options else []
    if "page-server" in options:
        address, colon, port = options["page-server"].rpartition(":")
        if not (colon and port.isdecimal()):
            raise Invalid(what="read the options", cause=f"--page-server is {options['page-server']!r}, not ADDRESS:PORT")
        words += ["--page-server", "--address", address, "--port", port]
    if shutil.which("iptables-restore") is None:
        words += ["--network-lock", "nftables"]  # connections are held up by either
    for key in inherited:
        words += ["--external", key] if key.startswith("file[") else []
    for kind in _foreign(record):
        words += ["--external", f"{_JOINED[kind]}[{namespaces.identity(kind, record.pid)[1]}]:nacre-{kind}"]
    return words


def restore_words(record: Record, options: Options, images: str, work: str, inherited: Sequence[str]) -> list[str]:
    """criu's arguments to take it up again; descriptors from _FIRST_INHERITED on are stdin, stdout, stderr and joined namespaces."""
    words = ["restore", *_places(images, work), "--log-file", "restore.log", *_configured(record), *_common(options, _FLAGS)]
    words += ["--restore-detached", "--pidfile", _pid_file(work, record), "--root", record.rootfs, "--manage-cgroups=ignore"]
    for option in ("lsm-profile", "lsm-mount-context"):
        words += [f"--{option}", options[option]] if option in options else []
    for number, key in enumerate(inherited, _FIRST_INHERITED):
        words += ["--inherit-fd", f"fd[{number}]:{key}"]
    for number, kind in enumerate(_foreign(record), _FIRST_INHERITED + len(inherited)):
        words += ["--inherit-fd", f"fd[{number}]:nacre-{kind}"]
    return words


def _foreign(record: Record) -> list[str]:
    return sorted(record.joined.keys() & _JOINED.keys())


def _places(images: str, work: str) -> list[str]:
    return ["--images-dir", images, "--work-dir", work, "-v4", "--external", "mnt[]:ms"]  # binds are found by their paths


def _configured(record: Record) -> list[str]:
    """A file of CRIU's own options: an annotation's, else the one that runc's users have."""
    path = record.annotations.get("org.criu.config", _CONFIG if os.path.exists(_CONFIG) else "")
    return ["--config", path] if path else []


def _common(options: Options, flags: Sequence[str]) -> list[str]:
    words = [f"--{flag}" for flag in flags if options.get(flag)]
    mode = options.get("manage-cgroups-mode", "soft")
    if mode not in _MODES:
        raise Invalid(
            what="read the options", cause=f"--manage-cgroups-mode is {mode!r}", remedy=f"modes are {', '.join(_MODES)}"
        )
    for kind in options.get("empty-ns", ()):
        if kind != "network":
            raise Invalid(what="read the options", cause=f"--empty-ns is {kind!r}", remedy="network alone can be left empty")
        words += ["--empty-ns", "net"]
    return words


def _refuse(record: Record, process_tree: Mapping[str, Any], what: str) -> None:
    if process_tree.get("terminal"):
        raise Unsupported(what=what, cause="it has a terminal, whose other end is outside", remedy="run it with terminal: false")
    foreign = sorted(set(record.joined) - set(_JOINED))
    if foreign:
        raise Unsupported(what=what, cause=f"it shares the {foreign[0]} namespace {record.joined[foreign[0]]}")


def _descriptor(pid: int, number: int) -> str:
    """In CRIU's words: `pipe:[INODE]`, or a file or device from outside the container, `file[MOUNT:INODE]`."""
    place = f"/proc/{pid}/fd/{number}"
    if not stat.S_ISREG(mode := os.stat(place).st_mode) and not stat.S_ISCHR(mode):
        return os.readlink(place)
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
        mount = next(int(line.split()[1]) for line in file if line.startswith("mnt_id:"))
    return f"file[{mount:x}:{os.stat(place).st_ino:x}]"


def _freezer(record: Record) -> str:
    cgroup = life.cgroup_of(record)
    hierarchy = cgroup.layout.find("freezer") if cgroup is not None else None
    return cgroup.layout.directory(hierarchy, cgroup.path) if cgroup is not None and hierarchy is not None else ""


# -- running it


def _criu(what: str, options: Options) -> str:
    wanted = options.get("criu") or "criu"
    found = shutil.which(wanted)
    if found is None:
        raise Unsupported(
            what=what,
            cause=f"{wanted} is not installed (PATH is {os.environ.get('PATH', '')})",
            remedy="apt-get install criu",
        )
    return found


def _directories(options: Options) -> tuple[str, str]:
    images = os.path.abspath(options.get("image-path", "checkpoint"))
    work = os.path.abspath(options.get("work-path", images))
    for directory in (images, work):
        os.makedirs(directory, 0o700, exist_ok=True)
    return images, work


def _kept(images: str, what: str) -> list[str]:
    path = os.path.join(images, "descriptors.json")
    try:
        with open(path, "rb") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise Invalid(what=what, cause=f"{path}: {error}", remedy="--image-path is a directory that checkpoint wrote") from error
    if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
        raise Invalid(what=what, cause=f"{path} is no list of strings")
    return found


def _pid_file(work: str, record: Record) -> str:
    return os.path.join(work, f"{record.id}.pid")


_ASK = """#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = setup-namespaces ] || exit 0
echo "$CRTOOLS_INIT_PID" > {place}.asked && read status < {place}.answer && exit "$status"
"""


class _Asking:
    """CRIU asks, by its script, for what is due once the namespaces are there; the hooks are run here, where their words are heard."""

    def __init__(self, place: str, due: Mapping[str, Any], record: Record) -> None:
        self.script, self._due, self._record = f"{place}.hooks", due, record
        self._files = [self.script, f"{place}.asked", f"{place}.answer"]
        self.__exit__()
        with open(
            os.open(self.script, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o700), "w", encoding="utf-8"
        ) as file:
            file.write(_ASK.format(place=shlex.quote(place)))
        for pipe in self._files[1:]:
            os.mkfifo(pipe, 0o600)
        # Both ways open at both ends: nobody waits for a script that has died.
        self._asked, self._answer = (os.open(pipe, os.O_RDWR | os.O_CLOEXEC) for pipe in self._files[1:])

    def __enter__(self) -> _Asking:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._files:
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue

    def attend(self, criu: int) -> None:
        """Until process `criu` ends, or the hooks have been run. Raises HookFailed once CRIU has given up."""
        with owned(self._asked), owned(self._answer), owned(process.pidfd_open(criu)) as ended:
            poll = select.poll()
            poll.register(self._asked, select.POLLIN)
            poll.register(ended, select.POLLIN)
            if self._asked not in {fd for fd, _ in poll.poll()}:
                return
            document = life.oci_state(self._record, Status.CREATED) | {"pid": int(os.read(self._asked, 32))}
            try:
                for point in ("prestart", "createRuntime"):
                    hooks.run_all(self._due, point, document)
            except HookFailed:
                os.write(self._answer, b"1\n")
                os.waitpid(criu, 0)
                raise
            os.write(self._answer, b"0\n")


def _restored(
    what: str, words: Sequence[str], record: Record, cgroup: cgroups.Cgroup | None, work: str, due: Mapping[str, Any]
) -> int:
    with ExitStack() as held:
        given = [os.open(record.joined[kind], os.O_RDONLY | os.O_CLOEXEC) for kind in _foreign(record)]
        for fd in given:
            held.callback(os.close, fd)
        gates = cgroup.gates() if cgroup is not None else []
        for _, gate in gates:
            held.callback(os.close, gate)
        path = _pid_file(work, record)
        if os.path.exists(path):
            os.unlink(path)

        def prepare() -> None:
            for number, fd in enumerate([0, 1, 2, *given], _FIRST_INHERITED):
                os.dup2(fd, number)
            for _, gate in gates:
                os.write(gate, b"0")
            namespaces.unshare(Clone.NEWNS | (Clone.NEWCGROUP if record.cgroup_namespace else Clone(0)))
            mounts.mount(None, "/", None, MountFlag.SLAVE | MountFlag.REC)
            mounts.mount(record.rootfs, record.rootfs, None, MountFlag.BIND | MountFlag.REC)

        if due.get("prestart") or due.get("createRuntime"):
            asking = held.enter_context(_Asking(os.path.join(work, record.id), due, record))
            _run(what, [*words, "--action-script", asking.script], work, "restore.log", prepare, asking.attend)
        else:
            _run(what, words, work, "restore.log", prepare)
        with open(path, encoding="ascii") as file:
            pid = int(file.read())
        os.unlink(path)
        return pid


def _run(
    what: str,
    words: Sequence[str],
    work: str,
    log: str,
    prepare: Callable[[], None] = lambda: None,
    attend: Callable[[int], None] = lambda _criu: None,
) -> None:
    """CRIU to its end, `prepare` done in its process before, `attend` here meanwhile. Raises CriuFailed."""
    with owned(from_bytes("nacre-criu", b"")) as output, owned(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) as null:
        child = process.fork()
        if child == 0:
            _become(words, prepare, null, output)
        attend(child)
        _, status = os.waitpid(child, 0)
        said = os.pread(output, 1 << 16, 0).decode("utf-8", "replace").splitlines()
    code = os.waitstatus_to_exitcode(status)
    if code:
        place = os.path.join(work, log)
        raise CriuFailed(
            what=what,
            cause=f"criu {words[1]} ended with {code}" if code > 0 else f"criu {words[1]} was killed by signal {-code}",
            evidence=(*said, *_errors(place))[-EVIDENCE_LINES:],
            remedy=f"look at {place}; criu check says what this kernel lacks",
        )


def _become(words: Sequence[str], prepare: Callable[[], None], null: int, output: int) -> NoReturn:
    try:
        prepare()
        for number, fd in enumerate((null, output, output)):
            os.dup2(fd, number)
        os.execv(words[0], list(words))
    except BaseException as error:
        os.write(output, f"{error}\n".encode())
    finally:
        os._exit(127)


def _errors(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in file if "Error" in line]
    except OSError:
        return []  # it did not come so far
