"""What the recorder keeps of secrets: nothing."""

from __future__ import annotations

from nacre.oci.trace import mask


def test_environments_are_kept_by_name_alone() -> None:
    cri = {"config": {"envs": [{"key": "PASSWORD", "value": "hush"}, {"key": "PATH", "value": "/bin"}]}}
    assert mask(cri) == {"config": {"envs": [{"key": "PASSWORD", "value": "(masked)"}, {"key": "PATH", "value": "/bin"}]}}
    oci = {"process": {"env": ["PATH=/bin", "PASSWORD=hush=hush", "EMPTY"]}}
    assert mask(oci) == {"process": {"env": ["PATH=/bin", "PASSWORD=(masked)", "EMPTY=(masked)"]}}


def test_a_pods_references_stay_and_a_secrets_data_goes() -> None:
    pod = {"env": [{"name": "P", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}
    assert mask(pod) == pod
    secret = {"kind": "Secret", "data": {"k": "aHVzaA=="}, "stringData": {"k": "hush"}, "type": "Opaque"}
    assert mask(secret) == {"kind": "Secret", "data": "(masked)", "stringData": "(masked)", "type": "Opaque"}
