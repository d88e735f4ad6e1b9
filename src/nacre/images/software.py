"""Debian packages for images, fetched with the host's own apt: its mirrors, its keys, its proxy. The host's packages stay as they are.

apt runs with a state directory of its own that says "nothing is installed", so it names everything that a package needs. No
maintainer script runs anywhere. What was fetched, and for what, stands in SOFTWARE/plan.json with digests; a later run needs no apt.

    SOFTWARE/plan.json   {"key": of the question, "layers": {name: [file, …]}, "sha256": {file: HEX}}
    SOFTWARE/debs/       package files        SOFTWARE/apt/  apt's own state, lists if the host's lack something
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nacre.images.errors import ImageToolMissing, disk_full
from nacre.images.recipes import LEFT_OUT, Layer
from nacre.oci.errors import EVIDENCE_LINES, Failure

_HOSTS_LISTS = "/var/lib/apt/lists"


class SoftwareUnavailable(Failure):
    """apt could not name or fetch a package."""


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """SOFTWARE for this process alone."""
    os.makedirs(f"{directory}/debs", exist_ok=True)
    fd = os.open(f"{directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def packages(directory: str, layers: Sequence[Layer]) -> dict[str, list[str]]:
    """Layer name → paths of its package files, in a fixed order; fetched unless they are here. The caller holds `locked`."""
    key = _key(layers)
    plan = _read_plan(directory)
    if plan.get("key") != key or not _is_whole(directory, plan["sha256"]):
        _need_tools()
        plan = _fetch(_Apt(directory), directory, layers)
        plan["key"] = key
        _write_plan(directory, plan)
    return {name: [f"{directory}/debs/{file}" for file in files] for name, files in plan["layers"].items()}


def _key(layers: Sequence[Layer]) -> str:
    """What the plan depends on: the packages asked for and the distribution that answers."""
    question = [[layer.name, layer.packages, layer.below, layer.left_out] for layer in layers]
    with open("/etc/os-release", encoding="utf-8") as file:
        distribution = [line for line in file if line.startswith(("ID=", "VERSION_ID=", "VERSION_CODENAME="))]
    text = json.dumps([question, LEFT_OUT, distribution, os.uname().machine])
    return hashlib.sha256(text.encode()).hexdigest()


def _need_tools() -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ImageToolMissing(
                what="fetch the demo's software",
                cause=f"{tool} is not installed: the demo's images are made from Debian packages",
                remedy="on another distribution import images instead: nacre image import FILE, or nacre image pull NAME",
            )


def _fetch(apt: _Apt, directory: str, layers: Sequence[Layer]) -> dict[str, Any]:
    """Ask apt for every layer, with the host's lists, else with fresh ones of our own."""
    try:
        files = _download(apt, directory, layers)
    except SoftwareUnavailable:
        apt.update()  # the host has no lists, or old ones whose files the mirror has dropped
        files = _download(apt, directory, layers)
    wanted = {file for names in files.values() for file in names}
    for name in os.listdir(f"{directory}/debs"):
        if name not in wanted:
            os.unlink(f"{directory}/debs/{name}")
    return {"layers": files, "sha256": {name: _sha256(f"{directory}/debs/{name}") for name in sorted(wanted)}}


def _download(apt: _Apt, directory: str, layers: Sequence[Layer]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for layer in layers:
        left_out = (*LEFT_OUT, *layer.left_out)
        found = [file for file in apt.closure(layer.packages) if not _matches(file.split("_")[0], left_out, layer.packages)]
        names[layer.name] = sorted(file for file in found if file not in names.get(layer.below, ()))
    missing = {file for files in names.values() for file in files if not os.path.exists(f"{directory}/debs/{file}")}
    if missing:
        apt.download(sorted(missing), f"{directory}/debs")
    return names


def _matches(name: str, patterns: Sequence[str], asked_for: Sequence[str]) -> bool:
    return name not in asked_for and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class _Apt:
    """apt-get with a state of its own below SOFTWARE/apt."""

    def __init__(self, directory: str) -> None:
        self._directory = f"{directory}/apt"
        os.makedirs(f"{self._directory}/lists/partial", exist_ok=True)
        os.makedirs(f"{self._directory}/cache/archives/partial", exist_ok=True)
        with open(f"{self._directory}/status", "wb"):
            pass  # nothing is installed
        own = any(name.endswith(("_Packages", "_Packages.lz4")) for name in os.listdir(f"{self._directory}/lists"))
        self._lists = f"{self._directory}/lists" if own else _HOSTS_LISTS

    def closure(self, names: Sequence[str]) -> list[str]:
        """The files of these packages and of all they depend on."""
        said = self._run("name packages", "install", "--print-uris", "--no-install-recommends", *names)
        return [line.split()[1] for line in said.splitlines() if line.startswith("'")]

    def download(self, files: Sequence[str], directory: str) -> None:
        """Fetch package files, checked by apt against its signed lists, into `directory`."""
        wanted = []
        for file in files:
            name, version, architecture = file.removesuffix(".deb").split("_")
            suffix = "" if architecture == "all" else f":{architecture}"
            wanted.append(f"{name}{suffix}={version.replace('%3a', ':')}")
        self._run("fetch packages", "download", *wanted, cwd=directory)
        for file in files:
            if not os.path.exists(f"{directory}/{file}"):
                raise SoftwareUnavailable(
                    what="fetch packages", cause=f"apt-get download left no {file}", remedy="apt-get update"
                )

    def update(self) -> None:
        """Lists of our own, from the host's sources."""
        self._lists = f"{self._directory}/lists"
        self._run("update package lists", "update")

    def _run(self, what: str, *words: str, cwd: str | None = None) -> str:
        options = {
            "Dir::State": self._directory,
            "Dir::State::status": f"{self._directory}/status",
            "Dir::State::lists": self._lists,
            "Dir::Cache": f"{self._directory}/cache",
            "APT::Sandbox::User": "root",  # apt's own user cannot write here
            "Debug::NoLocking": "1" if self._lists == _HOSTS_LISTS else "0",
            "Acquire::Retries": "2",
            "Acquire::Languages": "none",
        }
        command = ["apt-get", "-q", "-y", *(f"-o{key}={value}" for key, value in options.items()), *words]
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode == 0:
            return done.stdout
        evidence = tuple(line for line in (done.stderr or done.stdout).splitlines() if line.strip())[-EVIDENCE_LINES:]
        if "No space left" in done.stderr or "enough free space" in done.stderr:
            raise disk_full(what, self._directory)
        cause = f"apt-get {words[0]} ended with exit code {done.returncode}"
        raise SoftwareUnavailable(
            what=what, cause=cause, evidence=evidence, remedy="apt-get update shows whether the mirrors answer"
        )


def contents(path: str) -> subprocess.Popen[bytes]:
    """dpkg-deb writing the package's files as a tar to its stdout; the caller reads it to the end and waits."""
    return subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)


def _read_plan(directory: str) -> dict[str, Any]:
    try:
        with open(f"{directory}/plan.json", encoding="utf-8") as file:
            plan = json.load(file)
    except (FileNotFoundError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _write_plan(directory: str, plan: dict[str, Any]) -> None:
    with open(f"{directory}/plan.json.new", "w", encoding="utf-8") as file:
        json.dump(plan, file, indent=1)
    os.rename(f"{directory}/plan.json.new", f"{directory}/plan.json")


def _is_whole(directory: str, digests: dict[str, str]) -> bool:
    try:
        return bool(digests) and all(_sha256(f"{directory}/debs/{name}") == digest for name, digest in digests.items())
    except FileNotFoundError:
        return False


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
