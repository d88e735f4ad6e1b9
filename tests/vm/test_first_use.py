"""The first VM pod of a machine, as a CRI client with a deadline meets it: words in time, and what takes its time goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from kata_support import CACHE, Cri, look
from leftovers import settled

from nacre.wire import cri_pb2 as cri
from nacre.wire.cri import PROGRESS, progress_of

SANDBOX = cri.PodSandboxConfig(metadata=cri.PodSandboxMetadata(name="first", namespace="default", uid="first"), hostname="first")


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cri]:
    """A service without a guest; the kernel's package is at hand, if an earlier test has fetched it."""
    service = Cri(tmp_path / "node", environment={"NACRE_PACKAGES": f"{CACHE}/guest/var/lib/nacre/kata/cache"})
    try:
        yield service.start()
    finally:
        service.reset()


def test_a_caller_that_cannot_wait_for_the_guest_hears_so_before_its_deadline(fresh: Cri) -> None:
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as refused:
            fresh.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=SANDBOX, runtime_handler="kata"), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNKNOWN
        assert "building the guest of virtual machines, once on this machine" in refused.value.details()
    told = json.loads(fresh.runtime.Status(cri.StatusRequest(verbose=True)).info[PROGRESS])
    assert "building the guest" in told[progress_of("handler", "kata")], "it goes on without them"
    assert not fresh.runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items
    fresh.end()
    assert settled(fresh.prefix, replace(look(fresh.prefix), processes=()), limit_s=2).processes == (), (
        "the maker ends with the daemon"
    )


def test_without_qemu_the_handler_is_not_offered_and_names_what_is_missing(tmp_path: Path) -> None:
    service = Cri(tmp_path / "node", settings='[kata]\nqemu = "qemu-of-nobody"\n')
    try:
        service.start()
        assert "kata" not in [one.name for one in service.runtime.Status(cri.StatusRequest()).runtime_handlers]
        with pytest.raises(grpc.RpcError) as refused:
            service.runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=SANDBOX, runtime_handler="kata"), timeout=20)
        assert "qemu-of-nobody is not installed" in refused.value.details() and "apt-get install" in refused.value.details()
    finally:
        service.reset()
