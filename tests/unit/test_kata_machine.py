"""A VM's command line, size and mounts: rules that need no VM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nacre.agent import protocol
from nacre.kata import documents, machine, planning, sizing
from nacre.kata.drives import BadImage, identity
from nacre.kata.machine import MIB, Boot, Shape, Wires
from nacre.kata.plan import Plan
from nacre.kata.sizing import DEFAULT_BYTES, GRAIN, INCLUDED_BYTES, VmTooSmall
from nacre.kata.vm import CpuRefused, check_room
from nacre.kata.volumes import Meaning, Volumes, by_layout, meanings
from nacre.oci.errors import Invalid, Unsupported
from nacre.oci.handler import Sandbox

SHAPE = Shape(
    qemu="/usr/bin/qemu-system-x86_64", qemu_version="7.2", accelerator="tcg", ram_bytes=640 * MIB, hot_bytes=8 << 30, max_cpus=4
)
BOOT = Boot(kernel="/k", initrd="/i", cmdline="quiet -- -ISB agent")


def words_after(line: list[str], option: str) -> list[str]:
    return [line[index + 1] for index, word in enumerate(line) if word == option]


def test_a_clone_has_the_devices_of_the_machine_that_was_saved() -> None:
    wires = Wires.sample()
    cold, clone = machine.cold_line(SHAPE, wires, BOOT, shared=True), machine.clone_line(SHAPE, wires)
    for option in ("-device", "-netdev", "-chardev", "-cpu", "-smp", "-m", "-machine", "-blockdev", "-accel"):
        assert words_after(cold, option) == words_after(clone, option)
    assert "-incoming" in clone and "-kernel" not in clone


def test_only_the_template_writes_to_the_ram_file() -> None:
    wires = Wires.sample()
    ram = [word for word in words_after(machine.clone_line(SHAPE, wires), "-object") if "id=ram" in word]
    assert ram == [f"memory-backend-file,id=ram,size={640 * MIB},mem-path=/proc/self/fd/14,share=off,prealloc=off"]


def test_qemu_is_confined_and_has_no_default_devices() -> None:
    line = machine.clone_line(SHAPE, Wires.sample())
    assert {"-nodefaults", "-no-user-config"} <= set(line)
    assert words_after(line, "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert not [word for word in line if word.startswith("/") and word != SHAPE.qemu], "no path of the host"


def test_the_hosts_words_stand_before_those_of_the_guests_first_process() -> None:
    (append,) = words_after(machine.cold_line(SHAPE, Wires.sample(), BOOT, shared=False), "-append")
    assert append.index(machine.HOST_WORDS) < append.index(" -- ")


def test_a_templates_key_changes_with_all_that_a_clone_must_have_alike() -> None:
    plan = Plan(shape=SHAPE, boot=BOOT, guest="v1")
    others = [
        replace(plan, guest="v2"),
        replace(plan, boot=replace(BOOT, cmdline="loud -- x")),
        *(
            replace(plan, shape=replace(SHAPE, **change))
            for change in ({"qemu_version": "8"}, {"accelerator": "kvm"}, {"ram_bytes": MIB}, {"max_cpus": 1}, {"slots": 2})
        ),
    ]
    keys = {planning.key(one) for one in (plan, *others)}
    assert len(keys) == 1 + len(others)
    assert planning.key(replace(plan, boot=replace(BOOT, kernel="/elsewhere"))) == planning.key(plan), "a place is no content"


@given(st.lists(st.integers(0, 1 << 31), max_size=5), st.integers(0, 1 << 31))
def test_the_machine_holds_what_the_limits_ask_for(limits: list[int], pod: int) -> None:
    added = sizing.hot_bytes(limits, pod, replace(SHAPE, hot_bytes=1 << 40))
    assert added % GRAIN == 0
    assert INCLUDED_BYTES + added >= max(pod, sum(limits))
    if sum(limits) + DEFAULT_BYTES <= INCLUDED_BYTES and pod <= INCLUDED_BYTES:
        assert added == 0


def test_more_than_the_host_has_is_refused_with_the_sum() -> None:
    with pytest.raises(VmTooSmall, match="16384 MiB; this node can add 8192 MiB"):
        sizing.hot_bytes([16 << 30], 0, SHAPE)


@pytest.mark.parametrize(
    ("cpu", "count"),
    [
        ({}, 1),
        ({"quota": 50_000, "period": 100_000}, 1),
        ({"quota": 250_000, "period": 100_000}, 3),
        ({"quota": 10**7}, 4),
        ({"quota": -1}, 1),
    ],
)
def test_cpus_are_the_quota_rounded_up(cpu: dict[str, int], count: int) -> None:
    assert sizing.cpus({"cpu": cpu}, SHAPE) == count


# mounts


@pytest.mark.parametrize(
    ("inside", "kind", "name"),
    [
        ("volumes/kubernetes.io~configmap/cm", "configMap", "cm"),
        ("volumes/kubernetes.io~secret/tls", "secret", "tls"),
        ("volumes/kubernetes.io~projected/kube-api-access-x", "projected", "kube-api-access-x"),
        ("volumes/kubernetes.io~empty-dir/cache", "emptyDir", "cache"),
        ("etc-hosts", "file", "hosts"),
        ("containers/app/0", "file", "termination-log"),
    ],
)
def test_a_foreign_kubelets_layout_is_understood_for_this_pod_only(inside: str, kind: str, name: str) -> None:
    source = f"/var/lib/kubelet/pods/uid-1/{inside}"
    found = by_layout(source, "uid-1")
    assert (found.kind, found.name) == (kind, name)
    assert by_layout(source, "uid-2") == Meaning(kind="hostPath", name=source)
    assert by_layout(source, "") == Meaning(kind="hostPath", name=source)


@given(st.one_of(st.text(max_size=60), st.just('[{"destination": 1}]'), st.just('{"a": 1}'), st.just("[1]")))
def test_any_annotation_of_meanings_is_understood_or_passed_over(text: str) -> None:
    assert isinstance(meanings({"annotations": {"nacre.dev/mounts": text}}), dict)


def volumes(tmp_path: Path) -> tuple[Volumes, list[Any]]:
    asked: list[Any] = []

    def call(request: Any) -> Any:
        asked.append(request)
        return protocol.Place(path=f"/run/nacre/volumes/{request.name}")

    return Volumes(call, asked.append, str(tmp_path / "sandbox"), "uid-1"), asked


def mount(source: Path | str, target: str = "/t") -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": str(source), "options": ["rbind", "ro"]}


def test_a_config_maps_files_modes_and_generation_are_sent(tmp_path: Path) -> None:
    volume = tmp_path / "pods/uid-1/volumes/kubernetes.io~configmap/cm"
    (volume / "..2026_1").mkdir(parents=True)
    (volume / "..2026_1/key").write_bytes(b"value")
    (volume / "..2026_1/key").chmod(0o400)
    (volume / "..data").symlink_to("..2026_1")
    made, asked = volumes(tmp_path)
    (translated,) = made.translate("c", {"mounts": [mount(volume)]})
    assert translated["source"] == "/run/nacre/volumes/configMap-cm" and translated["options"] == ["rbind", "ro"]
    (files,) = asked
    assert files.generation == "2026_1"
    assert [(one.path, one.mode, one.content) for one in files.files] == [("key", 0o400, b"value")]


def test_an_empty_dir_is_made_once_for_all_containers(tmp_path: Path) -> None:
    volume = tmp_path / "pods/uid-1/volumes/kubernetes.io~empty-dir/cache"
    volume.mkdir(parents=True)
    made, asked = volumes(tmp_path)
    places = [made.translate(name, {"mounts": [mount(volume)]})[0]["source"] for name in ("a", "b")]
    assert places == ["/run/nacre/volumes/empty-cache"] * 2
    assert [type(one).__name__ for one in asked] == ["Volume"]


def test_a_host_path_brings_nothing_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of the host")
    made, asked = volumes(tmp_path)
    made.translate("c", {"mounts": [mount(tmp_path, "/a"), mount(tmp_path / "secret", "/b")]})
    assert b"of the host" not in b"".join(one.content for request in asked for one in getattr(request, "files", ()))
    with pytest.raises(Unsupported, match="a device or a socket"):
        made.translate("c", {"mounts": [mount("/dev/null")]})


# documents


def sandbox(**changes: Any) -> Sandbox:
    fields: dict[str, Any] = {"network": "", "ipc": "", "uts": ""}
    return Sandbox(
        id="s",
        pod_uid="u",
        directory="/d",
        hostname="h",
        cgroups_path="/c",
        namespaces=fields | changes.pop("add", {}),
        **changes,
    )


def test_a_vm_shares_no_namespace_with_the_host() -> None:
    documents.check_sandbox(sandbox())
    with pytest.raises(Unsupported, match="hostUsers"):
        documents.check_sandbox(sandbox(add={"user": ""}))


@pytest.mark.parametrize(
    ("linux", "words"),
    [
        ({"namespaces": []}, "hostPID"),
        ({"namespaces": [{"type": "pid"}], "devices": [{"path": "/dev/fuse"}]}, "/dev/fuse is a device of the host"),
    ],
)
def test_what_a_vm_is_not_given_is_refused_by_name(tmp_path: Path, linux: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"linux": linux}))
    with pytest.raises(Unsupported, match=words):
        documents.load(f"{tmp_path}/config.json", "create")


def test_a_privileged_containers_devices_are_the_vms(tmp_path: Path) -> None:
    linux = {
        "namespaces": [{"type": "pid"}],
        "devices": [{"path": "/dev/sda"}],
        "resources": {"devices": [{"allow": True, "access": "rwm"}]},
    }
    (tmp_path / "config.json").write_text(json.dumps({"linux": linux}))
    assert "devices" not in documents.load(f"{tmp_path}/config.json", "create")["linux"]


@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.integers(),
            lambda one: (
                st.lists(one) | st.dictionaries(st.sampled_from(["linux", "namespaces", "resources", "devices", "path"]), one)
            ),
        ).map(lambda one: json.dumps(one).encode()),
    )
)
@example(b"0")
@example(b"[]")
def test_any_file_for_a_document_is_refused_in_words(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises((Invalid, Unsupported)):
            documents.load(file.name, "create")


def test_a_root_that_is_no_erofs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(8192))
    with open(path, "rb") as file, pytest.raises(BadImage, match="no erofs"):
        identity(file.fileno(), str(path), "create")


def test_a_processor_is_refused_once_translated_code_has_filled_most_of_its_room() -> None:
    said = "Translation buffer state:\ngen code size       {}/134217728\nTB count            1\n"
    check_room(said.format(60 << 20))
    with pytest.raises(CpuRefused, match="120 of 128 MiB"):
        check_room(said.format(120 << 20))
