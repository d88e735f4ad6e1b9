"""The demo's container pods on every cgroup layout, VMs on another than this host's, and what is said where there is none: whole
machines, booted for the purpose."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_support import REPOSITORY, Outcome, run

from nacre.kata import appliance, appliance_kernel

NACRE = str(Path(sys.executable).parent / "nacre")
Payload = list[tuple[Path, str]]

SERVE = """
set -e
nacre up --timeout 300
nacre image import /payload/images.tar
nacre kubectl apply -f /payload/nginx.yaml
nacre kubectl wait --for=condition=Ready pod/nginx --timeout=300s || {
  nacre explain nginx; nacre kubectl describe pod nginx; nacre logs; exit 1; }
address=$(nacre kubectl get pod nginx -o 'jsonpath={.status.podIP}')
python3 -c "import urllib.request as u; print('STATUS', u.urlopen('http://$address/', timeout=20).status)"
nacre kubectl exec nginx -- sh -c 'echo INSIDE; cat /proc/self/cgroup'
groups=$(find /sys/fs/cgroup -path '*nacre*' \\( -name memory.max -o -name memory.limit_in_bytes \\))
echo "LIMITED $(cat $groups | grep -c '^67108864$')"
"""

GO = """
nacre kubectl delete pod nginx --timeout=120s
nacre down
echo "LEFT $(find /sys/fs/cgroup -path '*nacre*' -type d | wc -l) $(grep -c '/nacre/' /proc/self/mountinfo || true)"
"""

BY_SYSTEMD = """
scope=$(systemctl list-units --no-legend --plain 'nacre-*.scope' | cut -d ' ' -f 1)
systemctl show $scope -p ControlGroup,MemoryMax,Delegate
systemctl list-units --no-legend --plain --type=slice
"""

REFUSE = """
nacre doctor && exit 3
nacre up --timeout 300 || exit 0
nacre image import /payload/images.tar
nacre kubectl apply -f /payload/nginx.yaml
nacre kubectl wait --for=condition=Ready pod/nginx --timeout=30s && exit 4
nacre explain nginx; nacre kubectl describe pod nginx
nacre down
"""

VM_PACKAGES = ("qemu-system-x86", "erofs-utils", "lz4")
# What a machine with udev has loaded; the emulated processor has AMD's virtualization, so the pod's VM runs under KVM there.
VM_POD = """
set -e
modprobe -a tun kvm_amd
mkdir -p /etc/nacre; cp /payload/patient.toml /etc/nacre/config.toml
nacre up --timeout 900
NACRE_PACKAGES=/payload/kernel nacre enable kata
nacre image import /payload/images.tar
nacre kubectl apply -f /payload/vm.yaml
nacre kubectl wait --for=condition=Ready pod/vm --timeout=900s || {
  nacre explain vm; nacre kubectl describe pod vm; nacre logs; exit 1; }
echo "BOOTED $(cat /proc/sys/kernel/random/boot_id)"
nacre kubectl exec vm -- sh -c 'echo "BOOTED $(cat /proc/sys/kernel/random/boot_id)"; cat /proc/cmdline'
nacre kubectl exec vm -- sh -c 'exit 7' || echo "CODE $?"
nacre kubectl delete pod vm --timeout=300s
nacre down
echo "LEFT $(find /sys/fs/cgroup -path '*nacre*' -type d | wc -l) $(grep -c '/nacre/' /proc/self/mountinfo || true) $(pgrep -c qemu || true)"
"""

VM_MANIFEST = """apiVersion: v1
kind: Pod
metadata: {name: vm}
spec:
  runtimeClassName: kata
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: nacre.local/nginx:demo
"""

MANIFEST = """apiVersion: v1
kind: Pod
metadata: {name: nginx}
spec:
  terminationGracePeriodSeconds: 5
  containers:
  - name: nginx
    image: nacre.local/nginx:demo
    resources: {limits: {memory: 64Mi, cpu: "1"}}
"""


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Payload]:
    """The demo's nginx image, its pod, a configuration for systemd's driver, and kubectl where it is not in .venv."""
    directory = tmp_path_factory.mktemp("payload")
    nacre = [NACRE, "--prefix", str(directory / "node")]
    try:
        subprocess.run([*nacre, "image", "build-demo"], check=True)
        subprocess.run([*nacre, "image", "export", "nacre.local/nginx:demo", "-o", str(directory / "images.tar")], check=True)
    finally:
        subprocess.run([*nacre, "reset", "--yes"], check=True)
    (directory / "nginx.yaml").write_text(MANIFEST)
    (directory / "systemd.toml").write_text('cgroup_driver = "systemd"\n')
    kubectl = shutil.which("kubectl", path=f"{Path(NACRE).parent}:/usr/local/bin:/usr/bin:/snap/bin")
    assert kubectl, "kubectl is needed: ./run setup"
    names = ("images.tar", "nginx.yaml", "systemd.toml")
    yield [*((directory / name, name) for name in names), (Path(kubectl).resolve(), "kubectl")]


def served(outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.output
    for line in ("STATUS 200", "INSIDE", "LEFT 0 0"):
        assert line in outcome.output, outcome.output
    assert "LIMITED 0" not in outcome.output, outcome.output


PATH = "mkdir -p /opt/bin; ln -s /payload/kubectl /opt/bin/kubectl; export PATH=$PATH:/opt/bin\n"


@pytest.mark.parametrize(
    "layout", ["v2", pytest.param("v1", marks=pytest.mark.slow), pytest.param("hybrid", marks=pytest.mark.slow)]
)
def test_a_container_pod_serves_on_cgroup_layout(payload: Payload, tmp_path: Path, layout: str) -> None:
    served(run(PATH + SERVE + GO, layout, payload, tmp_path, timeout_s=900))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["systemd", "systemd-v1"])
def test_a_container_pod_serves_as_a_scope_that_systemd_made(payload: Payload, tmp_path: Path, layout: str) -> None:
    configure = "mkdir -p /etc/nacre; cp /payload/systemd.toml /etc/nacre/config.toml\n"
    outcome = run(PATH + configure + SERVE + BY_SYSTEMD + GO, layout, payload, tmp_path, timeout_s=900)
    served(outcome)
    assert "ControlGroup=/nacre.slice/nacre-kubepods.slice/nacre-kubepods-pod" in outcome.output, outcome.output


@pytest.mark.slow
def test_a_container_pod_serves_under_systemd_with_the_cgroupfs_driver(payload: Payload, tmp_path: Path) -> None:
    served(run(PATH + SERVE + GO, "systemd", payload, tmp_path, timeout_s=900))


@pytest.mark.slow
def test_without_any_cgroup_mount_the_controller_the_places_and_the_remedy_are_named(payload: Payload, tmp_path: Path) -> None:
    outcome = run(PATH + REFUSE, "none", payload, tmp_path, timeout_s=400)
    assert outcome.code == 0, outcome.output
    said = outcome.output.lower()
    assert "cgroup" in said and "looked in" in said and "mount -t cgroup2" in said, outcome.output
    assert "cgroup mountpoint does not exist" not in said


@pytest.mark.slow
def test_a_vm_pod_runs_under_kvm_on_cgroup_layout_v2(payload: Payload, tmp_path: Path) -> None:
    """A VM in the machine: the one place where a host without KVM sees nacre use it. Its kernel is the machine's, booted once more.
    One processor: with two, QEMU 7.2's emulation of virtualization hangs the machine now and then."""
    (tmp_path / "vm.yaml").write_text(VM_MANIFEST)
    (tmp_path / "patient.toml").write_text("patience = 40\n[kata]\npool = 0\n")
    cache = REPOSITORY / ".cache" / "guest" / "var/lib/nacre/kata/cache"
    kernel = Path(appliance_kernel.package(str(cache), (appliance.SHARED_CACHE,), print))
    brought = [*payload, *((tmp_path / name, name) for name in ("vm.yaml", "patient.toml")), (kernel, f"kernel/{kernel.name}")]
    outcome = run(PATH + VM_POD, "v2", brought, tmp_path, timeout_s=3600, memory_mib=4096, packages=VM_PACKAGES, processors=1)
    assert outcome.code == 0, outcome.output
    boots = re.findall(r"^BOOTED (\S+)$", outcome.output, re.MULTILINE)
    assert len(boots) == 2 and boots[0] != boots[1] and "nacre/agent" in outcome.output, outcome.output
    for line in ("accelerator: kvm", "CODE 7", "LEFT 0 0 0"):
        assert line in outcome.output, outcome.output
