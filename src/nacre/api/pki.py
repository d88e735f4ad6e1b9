"""The node's certificates, made in a process of its own: `python -m nacre.api.pki DIR --node NAME --host 127.0.0.1 …`.

Owns DIR: `ca`, `apiserver`, `admin`, `kubelet`, `controllers`, each `NAME.crt` (0644) and `NAME.key` (0600), elliptic curve
P-256. What is there is kept while it is signed by this CA, has the names asked for and is young enough; a kill between two
files leaves a key without its certificate, which the next run replaces. `cryptography` (8 MB) never enters the daemon.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nacre.api.kubeconfig import write_atomic

CA_LIFE, LEAF_LIFE = timedelta(days=3650), timedelta(days=365)
RENEW_BEFORE = timedelta(days=60)  # a leaf this near its end is made anew
CLOCK_SLACK = timedelta(minutes=5)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One certificate: `user` and `groups` are what the API server reads from its subject (CN and O)."""

    name: str
    user: str
    groups: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    usages: tuple[x509.ObjectIdentifier, ...] = (CLIENT,)


def wanted(node: str, hosts: tuple[str, ...]) -> tuple[Wanted, ...]:
    """The node's leaves; `hosts` are names and addresses that its API server and kubelet are reached under."""
    inside = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local")
    return (
        Wanted(name="apiserver", user="kube-apiserver", hosts=(*hosts, *inside), usages=(SERVER, CLIENT)),
        Wanted(name="admin", user="nacre-admin", groups=("system:masters",)),
        Wanted(name="kubelet", user=f"system:node:{node}", groups=("system:nodes",), hosts=hosts, usages=(SERVER, CLIENT)),
        Wanted(name="controllers", user="system:kube-controller-manager"),
    )


def ensure(directory: str, node: str, hosts: tuple[str, ...], now: datetime) -> list[str]:
    """Bring `directory` up to date; returns the names of what was made."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    ca = _load(directory, "ca")
    made = []
    if ca is None or ca[0].not_valid_after_utc < now + LEAF_LIFE:
        ca = _make_ca(directory, now)
        made.append("ca")
    for want in wanted(node, hosts):
        have = _load(directory, want.name)
        if have is None or not _fits(have[0], want, ca[0], now):
            _make_leaf(directory, want, ca, now)
            made.append(want.name)
    return made


Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _load(directory: str, name: str) -> Pair | None:
    """The pair on disk, None when a file is missing, unreadable or does not belong to the other."""
    try:
        with open(f"{directory}/{name}.crt", "rb") as file:
            certificate = x509.load_pem_x509_certificate(file.read())
        with open(f"{directory}/{name}.key", "rb") as file:
            key = serialization.load_pem_private_key(file.read(), None)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        return None
    return certificate, key


def _fits(certificate: x509.Certificate, want: Wanted, ca: x509.Certificate, now: datetime) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return False
    if certificate.not_valid_after_utc < now + RENEW_BEFORE or certificate.not_valid_before_utc > now:
        return False
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    return certificate.subject == _subject(want) and set(names) == set(_alternatives(want.hosts))


def _make_ca(directory: str, now: datetime) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nacre-ca")])
    builder = _builder(name, name, key, now, CA_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signing=True), critical=True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())
    _save(directory, "ca", certificate, key)
    return certificate, key


def _make_leaf(directory: str, want: Wanted, ca: Pair, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_subject(want), ca[0].subject, key, now, LEAF_LIFE)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signing=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(want.usages), critical=False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca[1].public_key())
    builder = builder.add_extension(authority, critical=False)
    if want.hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(_alternatives(want.hosts)), critical=False)
    _save(directory, want.name, builder.sign(ca[1], hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SLACK)
        .not_valid_after(now + life)
    )


def _subject(want: Wanted) -> x509.Name:
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in want.groups]
    return x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, want.user)])


def _alternatives(hosts: tuple[str, ...]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _usage(*, signing: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signing,
        crl_sign=signing,
        encipher_only=False,
        decipher_only=False,
    )


def _save(directory: str, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomic(f"{directory}/{name}.key", private)
    write_atomic(f"{directory}/{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nacre.api.pki", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--node", required=True)
    parser.add_argument("--host", action="append", default=[])
    options = parser.parse_args()
    for name in ensure(options.directory, options.node, tuple(options.host), datetime.now(UTC)):
        print(name)


if __name__ == "__main__":
    main()
