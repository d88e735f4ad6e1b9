"""Certificates: made once, kept while they fit, made anew when names or age demand it."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from nacre.api import kubeconfig, pki
from nacre.api.access import identify

NOW = datetime.now(UTC)
ALL = ["ca", "apiserver", "admin", "kubelet", "controllers"]


def test_everything_is_made_once(tmp_path: Path) -> None:
    directory = str(tmp_path / "pki")
    assert pki.ensure(directory, "n1", ("127.0.0.1",), NOW) == ALL
    assert pki.ensure(directory, "n1", ("127.0.0.1",), NOW) == []
    assert stat.S_IMODE((tmp_path / "pki/admin.key").stat().st_mode) == 0o600


def test_new_names_and_age_renew_what_they_concern(tmp_path: Path) -> None:
    directory = str(tmp_path)
    pki.ensure(directory, "n1", ("127.0.0.1",), NOW)
    assert pki.ensure(directory, "n1", ("127.0.0.1", "host.example"), NOW) == ["apiserver", "kubelet"]
    assert pki.ensure(directory, "n2", ("127.0.0.1", "host.example"), NOW) == ["kubelet"]
    assert pki.ensure(directory, "n2", ("127.0.0.1", "host.example"), NOW + timedelta(days=330)) == ALL[1:]
    assert pki.ensure(directory, "n2", ("127.0.0.1", "host.example"), NOW + timedelta(days=8 * 365)) == ALL[1:]
    assert pki.ensure(directory, "n2", ("127.0.0.1", "host.example"), NOW + timedelta(days=3600)) == ALL


def test_a_damaged_or_foreign_file_is_replaced(tmp_path: Path) -> None:
    directory = str(tmp_path)
    pki.ensure(directory, "n1", ("127.0.0.1",), NOW)
    (tmp_path / "admin.crt").write_text("rubbish")
    (tmp_path / "controllers.key").unlink()
    assert pki.ensure(directory, "n1", ("127.0.0.1",), NOW) == ["admin", "controllers"]
    (tmp_path / "ca.key").unlink()
    assert pki.ensure(directory, "n1", ("127.0.0.1",), NOW) == ALL


def test_the_subject_says_who_it_is(tmp_path: Path) -> None:
    pki.ensure(str(tmp_path), "n1", ("127.0.0.1",), NOW)
    certificate = x509.load_pem_x509_certificate((tmp_path / "kubelet.crt").read_bytes())
    shown = {"subject": tuple(((name.rfc4514_attribute_name, str(name.value)),) for name in certificate.subject)}
    words = {"CN": "commonName", "O": "organizationName"}
    shown["subject"] = tuple(((words[key], value),) for ((key, value),) in shown["subject"])
    user = identify(shown)
    assert (user.name, user.groups) == ("system:node:n1", ("system:nodes", "system:authenticated"))
    assert identify(None).name == identify({}).name == "system:anonymous"


def test_a_kubeconfig_is_complete_and_left_alone_when_true(tmp_path: Path) -> None:
    pki.ensure(str(tmp_path), "n1", ("127.0.0.1",), NOW)
    path = str(tmp_path / "etc/admin.conf")
    kubeconfig.write(path, server="https://127.0.0.1:1", pki=str(tmp_path), user="admin")
    before = Path(path).stat().st_ino
    kubeconfig.write(path, server="https://127.0.0.1:1", pki=str(tmp_path), user="admin")
    assert Path(path).stat().st_ino == before
    document = json.loads(Path(path).read_text())
    assert document["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:1"
    assert document["current-context"] == "nacre"
