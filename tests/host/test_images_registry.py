"""Pulls from registries that misbehave: a server of the test's own, on loopback, that breaks off, lies, refuses and dawdles."""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import os
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from images_support import NOTHING, blobs, directory, file, kept, layer, sha256

from nacre import config
from nacre.images import Auth, Store
from nacre.images.errors import (
    AuthenticationRequired,
    DigestMismatch,
    ImageNotFound,
    ImageRefused,
    NoMatchingPlatform,
    PullStalled,
    RegistryUnavailable,
    RegistryUnreachable,
)
from nacre.images.manifests import OCI_INDEX, OCI_MANIFEST, host_platform
from nacre.images.registry import Patience
from nacre.oci.errors import Failure

LAYERS = (layer(directory("etc"), file("etc/x", os.urandom(300_000))), layer(file("y", os.urandom(200_000))))
BLOBS, MANIFEST = blobs(LAYERS)
BIG = max(BLOBS, key=lambda digest: len(BLOBS[digest]))
NO_HTTP = "(no HTTP)"
QUICK = Patience(connect_s=2, stall_s=0.3, attempts=3, backoff_s=0.01)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # send so many bytes of the body, then break the connection
    hang: bool = False  # after the cut: keep it open and say no more
    gate: asyncio.Event | None = None  # wait for it before answering


Behaviour = Callable[[Request], Answer | None]


class Server:
    """A registry in a few lines of HTTP. `behave` may answer first; what it leaves is answered as a good registry would."""

    def __init__(self) -> None:
        self.content = dict(BLOBS)
        self.manifests: dict[str, tuple[str, bytes]] = {"1": (OCI_MANIFEST, MANIFEST)}
        self.behave: Behaviour = lambda _request: None
        self.seen: list[Request] = []
        self.host = ""
        self._writers: set[asyncio.StreamWriter] = set()

    def fetched(self, digest: str) -> list[Request]:
        return [request for request in self.seen if request.path.endswith(digest)]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while request := await self._read(reader):
                if request.method == NO_HTTP:  # a TLS greeting: servers answer it in plain words
                    writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                    await writer.drain()
                    break
                self.seen.append(request)
                if not await self._answer(writer, self.behave(request) or self.good(request)):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    def end(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> Request | None:
        line = await reader.readline()
        if not line:
            return None
        if not line.endswith(b" HTTP/1.1\r\n"):
            return Request(NO_HTTP, "", {}, b"")
        method, path, _ = line.decode("latin-1").split(" ", 2)
        headers = {}
        while (line := await reader.readline()) not in (b"\r\n", b""):
            key, _, value = line.decode("latin-1").partition(":")
            headers[key.lower()] = value.strip()
        return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))

    async def _answer(self, writer: asyncio.StreamWriter, answer: Answer) -> bool:
        if answer.gate is not None:
            await answer.gate.wait()
        headers = {"Content-Length": str(len(answer.body)), **answer.headers}
        head = f"HTTP/1.1 {answer.status} X\r\n" + "".join(f"{key}: {value}\r\n" for key, value in headers.items()) + "\r\n"
        writer.write(head.encode() + answer.body[: answer.cut])
        await writer.drain()
        if answer.hang:
            await asyncio.Event().wait()
        return answer.cut is None

    def good(self, request: Request) -> Answer:
        wanted = request.path.split("/")[-1].split("?")[0]
        if "/manifests/" in request.path and wanted in self.manifests:
            media_type, body = self.manifests[wanted]
            return Answer(body=body, headers={"Content-Type": media_type})
        if "/blobs/" in request.path and wanted in self.content:
            body = self.content[wanted]
            if "range" in request.headers:
                start = int(request.headers["range"].removeprefix("bytes=").rstrip("-"))
                return Answer(206, body[start:], {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
            return Answer(body=body)
        return Answer(404, json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such thing"}]}).encode())


@asynccontextmanager
async def registry(*, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> AsyncIterator[Server]:
    server = Server()
    listening = await asyncio.start_server(server.serve, address, 0, ssl=tls)
    server.host = f"{address}:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        server.end()
        await listening.wait_closed()


@asynccontextmanager
async def store(prefix: Path, *insecure: str, patience: Patience = QUICK) -> AsyncIterator[Store]:
    images = Store(config.Config(prefix=str(prefix), insecure_registries=insecure))
    await images.open()
    images.patience = patience
    try:
        yield images
    finally:
        await images.close()


async def test_an_image_is_pulled_verified_and_named_by_tag_and_digest(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    async with registry() as server, store(tmp_path) as images:
        image = await images.pull(f"{server.host}/a/b:1", progress=lambda *what: told.append(what))
        assert image.references == (f"{server.host}/a/b:1",)
        assert image.digests == (f"{server.host}/a/b@{sha256(MANIFEST)}",) == (image.pulled_as,)
        assert [len(server.fetched(digest)) for digest in BLOBS] == [1, 1, 1]
        again = await images.pull(f"{server.host}/a/b:1")
        assert again.id == image.id and len(server.fetched(BIG)) == 1
    assert ("unpack", 2, 2) in told and (BIG, len(BLOBS[BIG]), len(BLOBS[BIG])) in told


async def test_this_machines_entry_of_an_index_is_pulled_and_the_index_digest_is_the_name(tmp_path: Path) -> None:
    host = host_platform()
    other = {"os": "linux", "architecture": "s390x"}
    mine = {"os": "linux", "architecture": host.architecture}
    entries = [
        {"mediaType": OCI_MANIFEST, "digest": sha256(b"x"), "size": 1, "platform": other},
        {"mediaType": OCI_MANIFEST, "digest": sha256(MANIFEST), "size": len(MANIFEST), "platform": mine},
    ]
    index = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    foreign = json.dumps({"schemaVersion": 2, "manifests": entries[:1]}).encode()
    async with registry() as server, store(tmp_path) as images:
        server.manifests |= {
            "multi": (OCI_INDEX, index),
            sha256(MANIFEST): (OCI_MANIFEST, MANIFEST),
            "other": (OCI_INDEX, foreign),
        }
        image = await images.pull(f"{server.host}/a:multi")
        assert image.digests == (f"{server.host}/a@{sha256(index)}",)
        assert images.get(f"{server.host}/a@{sha256(index)}") == image
        with pytest.raises(NoMatchingPlatform, match="has linux/s390x"):
            await images.pull(f"{server.host}/a:other")


async def test_a_connection_dropped_in_mid_layer_goes_on_where_it_stopped(tmp_path: Path) -> None:
    tries = 0

    def drop(request: Request) -> Answer | None:
        nonlocal tries
        if request.path.endswith(BIG):
            tries += 1
            if tries <= 2:
                whole = server.good(request)
                whole.cut = 100_000
                return whole
        return None

    async with registry() as server, store(tmp_path) as images:
        server.behave = drop
        await images.pull(f"{server.host}/a:1")
        assert [request.headers.get("range") for request in server.fetched(BIG)] == [None, "bytes=100000-", "bytes=200000-"]


async def test_a_pull_that_gave_up_is_continued_by_the_next_one_even_in_another_process(tmp_path: Path) -> None:
    async with registry() as server:
        server.behave = lambda request: (
            Answer(body=BLOBS[BIG], cut=70_000 if "range" not in request.headers else 0) if request.path.endswith(BIG) else None
        )
        async with store(tmp_path) as images:
            with pytest.raises(PullStalled) as stalled:
                await images.pull(f"{server.host}/a:1")
        assert f"blob {BIG} from {server.host}: 70000 of {len(BLOBS[BIG])} bytes" in stalled.value.cause
        assert kept(tmp_path)["ingest"] == [BIG.removeprefix("sha256:")]
        server.behave = lambda _request: None
        async with store(tmp_path) as images:
            await images.pull(f"{server.host}/a:1")
        assert server.fetched(BIG)[-1].headers["range"] == "bytes=70000-"
    assert kept(tmp_path)["ingest"] == []


async def test_a_server_without_ranges_is_read_from_the_start(tmp_path: Path) -> None:
    tries = 0

    def drop(request: Request) -> Answer | None:
        nonlocal tries
        if not request.path.endswith(BIG):
            return None
        tries += 1
        return Answer(body=BLOBS[BIG], cut=100_000 if tries == 1 else None)

    async with registry() as server, store(tmp_path) as images:
        server.behave = drop
        await images.pull(f"{server.host}/a:1")
        assert tries == 2


async def test_a_wrong_beginning_left_on_the_disk_is_thrown_away_and_fetched_again(tmp_path: Path) -> None:
    async with registry() as server, store(tmp_path) as images:
        (tmp_path / "var/lib/nacre/images/ingest" / BIG.removeprefix("sha256:")).write_bytes(b"\0" * 5000)
        await images.pull(f"{server.host}/a:1")
        assert [request.headers.get("range") for request in server.fetched(BIG)] == ["bytes=5000-", None]


async def test_content_that_is_not_its_digest_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    wrong = bytearray(BLOBS[BIG])
    wrong[1000] ^= 1
    async with registry() as server, store(tmp_path) as images:
        server.content[BIG] = bytes(wrong)
        with pytest.raises(DigestMismatch, match=f"not {BIG}"):
            await images.pull(f"{server.host}/a:1")
        server.content[BIG] = BLOBS[BIG] + b"more"
        with pytest.raises(DigestMismatch, match="more bytes came"):
            await images.pull(f"{server.host}/a:1")
        assert images.list() == []
    assert kept(tmp_path) == NOTHING


async def test_a_manifest_that_is_not_its_digest_is_refused(tmp_path: Path) -> None:
    async with registry() as server, store(tmp_path) as images:
        server.manifests[sha256(b"other")] = (OCI_MANIFEST, MANIFEST)
        with pytest.raises(DigestMismatch, match="sent a manifest that is"):
            await images.pull(f"{server.host}/a@{sha256(b'other')}")
    assert kept(tmp_path) == NOTHING


async def test_silence_ends_in_a_failure_that_says_blob_bytes_and_host(tmp_path: Path) -> None:
    async with registry() as server, store(tmp_path) as images:
        server.behave = lambda request: Answer(body=BLOBS[BIG], cut=3000, hang=True) if request.path.endswith(BIG) else None
        with pytest.raises(PullStalled) as stalled:
            await images.pull(f"{server.host}/a:1")
    assert "no byte came in 0.3 s" in stalled.value.cause
    assert (
        server.host in stalled.value.cause
        and BIG in stalled.value.cause
        and f" of {len(BLOBS[BIG])} bytes" in stalled.value.cause
    )


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (404, ImageNotFound, "/a:1: not found"),
        (403, AuthenticationRequired, "pull access denied"),
        (500, RegistryUnavailable, "answers 500"),
        (429, RegistryUnavailable, "too many requests"),
        (418, RegistryUnavailable, "answers 418"),
    ],
)
async def test_a_refusal_has_the_registrys_own_words_as_evidence(
    tmp_path: Path, status: int, kind: type[Failure], words: str
) -> None:
    body = json.dumps({"errors": [{"code": "CODE", "message": "in its own words"}]}).encode()
    async with registry() as server, store(tmp_path) as images:
        server.behave = lambda _request: Answer(status, body)
        with pytest.raises(kind) as refused:
            await images.pull(f"{server.host}/a:1")
        assert len(server.seen) == (3 if status in (500, 429) else 1) + 0
    assert words in refused.value.cause
    assert refused.value.evidence == ("CODE: in its own words",)
    assert kept(tmp_path) == NOTHING


async def test_an_error_that_passes_is_not_noticed(tmp_path: Path) -> None:
    async with registry() as server, store(tmp_path) as images:
        server.behave = lambda request: Answer(503) if len(server.fetched(request.path.split("/")[-1])) == 1 else None
        assert (await images.pull(f"{server.host}/a:1")).references


async def test_a_login_page_instead_of_a_manifest_is_no_image(tmp_path: Path) -> None:
    async with registry() as server, store(tmp_path) as images:
        server.behave = lambda _request: Answer(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
        with pytest.raises(ImageRefused, match="no JSON"):
            await images.pull(f"{server.host}/a:1")


def bearer(server: Server, valid: str) -> Behaviour:
    """A registry that wants a token, and its token server under /token."""

    def behave(request: Request) -> Answer | None:
        if request.path.startswith("/token"):
            authorization = request.headers.get("authorization", "")
            good = authorization == "Basic " + base64.b64encode(b"me:secret").decode() or b"refresh_token=renew" in request.body
            return Answer(200, json.dumps({"token": "let-me-in" if good else "anonymous"}).encode())
        if request.headers.get("authorization") == f"Bearer {valid}":
            return None
        challenge = f'Bearer realm="http://{server.host}/token",service="s",scope="repository:a:pull"'
        return Answer(
            401, b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}', {"WWW-Authenticate": challenge}
        )

    return behave


@pytest.mark.parametrize(
    "auth",
    [
        Auth(username="me", password="secret"),
        Auth(auth=base64.b64encode(b"me:secret").decode()),
        Auth(identity_token="renew"),
        Auth(registry_token="let-me-in"),
    ],
    ids=["password", "auth", "identity token", "registry token"],
)
async def test_every_kind_of_credentials_gets_a_token(tmp_path: Path, auth: Auth) -> None:
    async with registry() as server, store(tmp_path) as images:
        server.behave = bearer(server, "let-me-in")
        image = await images.pull(f"{server.host}/a:1", auth)
        assert image.references
        tokens = [request for request in server.seen if request.path.startswith("/token")]
        if auth.registry_token:
            assert not tokens
        else:
            assert len(tokens) == 1
            asked = tokens[0].path + tokens[0].body.decode()
            assert "service=s" in asked and "repository%3Aa%3Apull" in asked.replace("repository:a:pull", "repository%3Aa%3Apull")


async def test_public_images_are_pulled_with_an_anonymous_token(tmp_path: Path) -> None:
    async with registry() as server, store(tmp_path) as images:
        server.behave = bearer(server, "anonymous")
        assert (await images.pull(f"{server.host}/a:1")).references


async def test_wrong_and_missing_credentials_are_told_apart(tmp_path: Path) -> None:
    async with registry() as server, store(tmp_path) as images:
        server.behave = bearer(server, "let-me-in")
        with pytest.raises(AuthenticationRequired, match="without credentials"):
            await images.pull(f"{server.host}/a:1")
        with pytest.raises(AuthenticationRequired, match="with the credentials given") as refused:
            await images.pull(f"{server.host}/a:1", Auth(username="me", password="wrong"))
        assert "wrong" not in str(refused.value) + repr(refused.value)
        server.behave = lambda _request: Answer(401, b"", {"WWW-Authenticate": 'Basic realm="r"'})
        with pytest.raises(AuthenticationRequired, match="no basic auth credentials"):
            await images.pull(f"{server.host}/a:1")
    assert kept(tmp_path) == NOTHING


async def test_a_redirect_is_followed_without_the_credentials(tmp_path: Path) -> None:
    async with registry() as server, registry(address="127.0.0.2") as storage, store(tmp_path, "127.0.0.2") as images:
        login = bearer(server, "let-me-in")

        def behave(request: Request) -> Answer | None:
            refused = login(request)
            if refused is None and "/blobs/" in request.path:
                return Answer(307, b"", {"Location": f"http://{storage.host}{request.path}?signed=%2Fyes"})
            return refused

        server.behave = behave
        await images.pull(f"{server.host}/a:1", Auth(username="me", password="secret"))
        assert {request.path.split("?")[1] for request in storage.seen} == {"signed=%2Fyes"}
        assert not any("authorization" in request.headers for request in storage.seen)
        server.behave = lambda _request: Answer(302, b"", {"Location": f"http://{server.host}/again"})
        with pytest.raises(RegistryUnavailable, match="redirects more than"):
            await images.pull(f"{server.host}/a:2")
        server.behave = lambda _request: Answer(302, b"", {"Location": "http://[::1"})
        with pytest.raises(RegistryUnavailable, match="which is no URL"):
            await images.pull(f"{server.host}/a:3")
        server.behave = lambda _request: Answer(401, b"", {"WWW-Authenticate": 'Bearer realm="http://[::1"'})
        with pytest.raises(RegistryUnavailable, match="without saying where"):
            await images.pull(f"{server.host}/a:4")


async def test_pulls_of_one_image_at_the_same_time_share_one_download(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with registry() as server, store(tmp_path, patience=Patience()) as images:
        server.behave = lambda request: Answer(body=BLOBS[BIG], gate=gate) if request.path.endswith(BIG) else None
        server.manifests["2"] = server.manifests["1"]
        names = (f"{server.host}/a:1", f"{server.host}/a:1", f"{server.host}/b:2")
        pulls = [asyncio.create_task(images.pull(name)) for name in names]
        while not server.fetched(BIG):
            await asyncio.sleep(0.005)
        pulls[0].cancel()
        gate.set()
        done = await asyncio.gather(*pulls[1:])
        assert done[0].id == done[1].id
        assert len(server.fetched(BIG)) == 1
        with pytest.raises(asyncio.CancelledError):
            await pulls[0]
        assert images.get(f"{server.host}/b:2") is not None


async def test_a_pull_nobody_waits_for_any_more_ends_and_can_be_asked_for_again(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with registry() as server, store(tmp_path, patience=Patience()) as images:
        server.behave = lambda request: Answer(body=BLOBS[BIG], gate=gate) if request.path.endswith(BIG) else None
        pull = asyncio.create_task(images.pull(f"{server.host}/a:1"))
        while not server.fetched(BIG):
            await asyncio.sleep(0.005)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        server.behave = lambda _request: None
        assert (await images.pull(f"{server.host}/a:1")).references


async def test_a_plain_registry_that_is_not_configured_so_is_explained_with_the_line_to_write(tmp_path: Path) -> None:
    """Its name is not loopback for nacre, though it leads there."""
    async with registry() as server, store(tmp_path) as images:
        port = server.host.split(":")[1]
        name = f"{_alias()}:{port}"
        with pytest.raises(RegistryUnreachable) as refused:
            await images.pull(f"{name}/a:1")
        assert "http: server gave HTTP response to HTTPS client" in refused.value.cause
        assert f'insecure_registries = ["{name}"]' in refused.value.remedy
        assert f"{tmp_path}/etc/nacre/config.toml" in refused.value.remedy


async def test_a_configured_registry_is_spoken_to_in_plain_http(tmp_path: Path) -> None:
    async with registry() as server:
        name = f"{_alias()}:{server.host.split(':')[1]}"
        async with store(tmp_path, name) as images:
            assert (await images.pull(f"{name}/a:1")).references == (f"{name}/a:1",)


def _alias() -> str:
    """A name of this machine that leads to loopback but is no loopback name."""
    import socket

    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET)
    except OSError:
        found = []
    if not found or not str(found[0][4][0]).startswith("127.0.0.1"):
        pytest.skip(f"getaddrinfo({name}): the host's own name does not lead to 127.0.0.1")
    return name


def certificate(directory: Path) -> ssl.SSLContext:
    """A server context with a certificate that nobody trusts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")
    return context


async def test_a_certificate_that_nobody_vouches_for_is_refused_even_on_loopback(tmp_path: Path) -> None:
    async with registry(tls=certificate(tmp_path)) as server, store(tmp_path) as images:
        with pytest.raises(RegistryUnreachable) as refused:
            await images.pull(f"{server.host}/a:1")
        assert server.seen == []
    assert "tls: failed to verify certificate: x509:" in refused.value.cause
    assert "update-ca-certificates" in refused.value.remedy


async def test_a_closed_port_and_an_unknown_name_say_what_was_tried(tmp_path: Path) -> None:
    async with registry() as server:
        closed = server.host
    async with store(tmp_path) as images:
        with pytest.raises(RegistryUnreachable, match=f"connect {closed}"):
            await images.pull(f"{closed}/a:1")
        with pytest.raises(RegistryUnreachable, match=r"lookup nowhere\.invalid: no such host"):
            await images.pull("nowhere.invalid/a:1")


async def test_a_proxy_that_fails_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with registry() as server:
        monkeypatch.setenv("https_proxy", f"http://user:hush@{server.host}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        server.behave = lambda _request: Answer(403)
        async with store(tmp_path) as images:
            with pytest.raises(RegistryUnreachable) as refused:
                await images.pull("reg.example.invalid/a:1")
    assert server.seen[0].method == "CONNECT"
    assert f"through the proxy http://{server.host}" in refused.value.evidence[0]
    assert "hush" not in str(refused.value) + "".join(refused.value.evidence)


async def test_names_of_this_node_are_never_looked_for_in_a_registry(tmp_path: Path) -> None:
    async with store(tmp_path) as images:
        with pytest.raises(ImageNotFound) as refused:
            await images.pull("nacre.local/mine:1")
    assert "nacre image import" in refused.value.remedy and "nacre.local/nginx:demo" in refused.value.cause
