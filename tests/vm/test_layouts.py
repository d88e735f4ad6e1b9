"""The demo's container pods on every cgroup layout, and what is said where there is none: whole machines, booted for the purpose."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_support import REPOSITORY, Outcome, run

BIN = Path(sys.executable).parent

PREPARE = """set -e
export PATH=/opt/nacre/bin:$PATH
nacre() { python3 -c 'from nacre.cli.main import main; main()' "$@"; }
"""

SERVE = """
nacre up
nacre image import /opt/nacre/images.tar
nacre kubectl apply -f /opt/nacre/nginx.yaml
nacre kubectl wait --for=condition=Ready pod/nginx --timeout=120s || { nacre explain nginx; nacre kubectl describe pod nginx; exit 1; }
address=$(nacre kubectl get pod nginx -o 'jsonpath={.status.podIP}')
python3 -c "import urllib.request as u; print('STATUS', u.urlopen('http://$address/', timeout=20).status)"
nacre kubectl exec nginx -- sh -c 'echo INSIDE; cat /proc/self/cgroup'
echo LIMIT $(cat $(find /sys/fs/cgroup -path '*nacre*' \\( -name memory.max -o -name memory.limit_in_bytes \\)) | grep -c 67108864)
nacre kubectl delete pod nginx --timeout=60s
nacre down
echo LEFT $(find /sys/fs/cgroup -path '*nacre*' -type d | wc -l) $(grep -c /nacre /proc/self/mountinfo || true)
"""

REFUSE = """
nacre doctor && exit 3
nacre up || true
nacre image import /opt/nacre/images.tar || true
nacre kubectl apply -f /opt/nacre/nginx.yaml || true
nacre down || true
exit 0
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
def payload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[Path, str]]]:
    """nacre as installed here, kubectl, and the demo's nginx image, as (host path, guest path)."""
    directory = tmp_path_factory.mktemp("payload")
    prefix = directory / "node"
    nacre = [str(BIN / "nacre"), "--prefix", str(prefix)]
    subprocess.run([*nacre, "image", "build-demo"], check=True)
    subprocess.run([*nacre, "image", "export", "nacre.local/nginx:demo", "-o", str(directory / "images.tar")], check=True)
    (directory / "nginx.yaml").write_text(MANIFEST)
    (directory / "nacre.pth").write_text("/opt/nacre/src\n/opt/nacre/site\n")
    kubectl = BIN / "kubectl" if (BIN / "kubectl").exists() else Path(shutil.which("kubectl") or "")
    yield [
        (REPOSITORY / "src", "/opt/nacre/src"),
        (Path(sysconfig.get_path("purelib")), "/opt/nacre/site"),
        (directory / "nacre.pth", "/usr/lib/python3/dist-packages/nacre.pth"),
        (directory / "images.tar", "/opt/nacre/images.tar"),
        (directory / "nginx.yaml", "/opt/nacre/nginx.yaml"),
        (kubectl.resolve(), "/opt/nacre/bin/kubectl"),
    ]
    subprocess.run([*nacre, "reset", "--yes"], check=True)


@pytest.mark.parametrize("layout", ["v2", "v1", "hybrid"])
def test_a_container_pod_serves_on_cgroup_layout(payload: list[tuple[Path, str]], tmp_path: Path, layout: str) -> None:
    outcome = run(PREPARE + SERVE, layout, payload, tmp_path, timeout_s=400)
    assert outcome.code == 0, outcome.output
    for line in ("STATUS 200", "INSIDE", "LEFT 0 0"):
        assert line in outcome.output, outcome.output
    assert "LIMIT 0" not in outcome.output, outcome.output


def test_without_any_cgroup_mount_the_controller_the_places_and_the_remedy_are_named(
    payload: list[tuple[Path, str]], tmp_path: Path
) -> None:
    outcome = run(PREPARE + REFUSE, "none", payload, tmp_path, timeout_s=300)
    assert outcome.code == 0, outcome.output
    _names_the_controller(outcome)


def _names_the_controller(outcome: Outcome) -> None:
    said = outcome.output.lower()
    assert "cgroup" in said and "/sys/fs/cgroup" in said and "mount -t cgroup2" in said, outcome.output
    assert "cgroup mountpoint does not exist" not in said
