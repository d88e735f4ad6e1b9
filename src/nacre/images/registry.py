"""One repository of one registry, spoken to in HTTP: OCI distribution spec; Docker Registry HTTP API V2.

Knows TLS and plain http, challenges and tokens, redirects, proxies and retries; what failed becomes a Failure here, with the words
that the field searches for. Credentials go to the registry's own origin and to the token server it names, never along a redirect.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from yarl import URL

from nacre.images import auth as credentials
from nacre.images.auth import Challenge
from nacre.images.errors import AuthenticationRequired, ImageNotFound, ImageRefused, RegistryUnavailable, RegistryUnreachable
from nacre.images.manifests import ACCEPT, MANIFEST_LIMIT
from nacre.images.model import Auth, Descriptor
from nacre.images.proxies import is_loopback, proxy_for
from nacre.images.reference import DEFAULT_DOMAIN, Reference
from nacre.oci.errors import Failure

REDIRECTS = 5
_TOKEN_LIMIT = 1 << 20
_BODY_SHOWN = 4096
T = TypeVar("T")
_PLAIN = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long and how often."""

    connect_s: float = 15
    stall_s: float = 60  # without a byte
    attempts: int = 5  # in a row without progress
    backoff_s: float = 0.5  # doubled each time, to at most 10 s


class Broken(Exception):
    """Trouble that another try may mend; `failure` is what to say if it does not."""

    def __init__(self, failure: Failure, after_s: float = 0) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.after_s = after_s


class Registry:
    """The repository that `reference` names. `session` is the caller's, made without automatic decompression."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        reference: Reference,
        auth: Auth | None,
        *,
        plain: bool,
        settings: str,
        patience: Patience,
    ) -> None:
        self._session = session
        self._reference = reference
        self._auth = auth if auth is not None and credentials.is_for(auth, reference.domain) else None
        self._settings = settings  # path of config.toml, for remedies
        self._patience = patience
        self._host = "registry-1.docker.io" if reference.domain == DEFAULT_DOMAIN else reference.domain
        self._what = f'pull image "{reference}"'
        self._schemes = ["http"] if plain else ["https"]
        if not plain and is_loopback(URL(f"http://{self._host}").host or ""):
            self._schemes.append("http")
        self._authorization = ""

    @property
    def host(self) -> str:
        return self._host

    async def manifest(self, wanted: str) -> tuple[bytes, str]:
        """(body, media type) of a tag or digest. Raises ImageNotFound, AuthenticationRequired, RegistryUnreachable, …"""

        async def fetch() -> tuple[bytes, str]:
            path = f"/v2/{self._reference.path}/manifests/{wanted}"
            async with self._get(path, {"Accept": ACCEPT}) as response:
                if response.status != 200:
                    raise await self._refusal(response, f"{self._reference.repository}:{wanted}".replace(":sha256:", "@sha256:"))
                data = await self._body(response, MANIFEST_LIMIT)
                return data, response.headers.get("Content-Type", "")

        return await self.patiently(fetch)

    async def patiently(self, act: Callable[[], Awaitable[T]]) -> T:
        """`act()` again and again while it raises Broken, at most as often as patience allows."""
        for attempt in range(self._patience.attempts):
            try:
                return await act()
            except Broken as broken:
                if attempt + 1 == self._patience.attempts:
                    raise broken.failure from broken
                await asyncio.sleep(self.pause(attempt, broken))
        raise AssertionError("unreachable")

    def pause(self, attempt: int, broken: Broken) -> float:
        """Seconds to wait after try number `attempt` (from 0)."""
        return max(min(self._patience.backoff_s * (1 << attempt), 10), min(broken.after_s, 30))

    @asynccontextmanager
    async def blob(self, blob: Descriptor, offset: int) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """(offset at which the body begins, its pieces); a server that knows no ranges begins at 0. Raises Broken, also on the way."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._get(f"/v2/{self._reference.path}/blobs/{blob.digest}", headers) as response:
            if response.status == 206:
                start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
                if start != str(offset):
                    raise Broken(self._odd(response, f"asked for bytes from {offset}, it sent from {start or '?'}"))
                yield offset, self._pieces(response)
            elif response.status == 200:
                yield 0, self._pieces(response)
            else:
                raise await self._refusal(response, f"blob {blob.digest} of {self._reference}")

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        with self._translated(response.url):
            async for piece in response.content.iter_any():
                yield piece

    async def _body(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        data = bytearray()
        async for piece in self._pieces(response):
            data += piece
            if len(data) > limit:
                raise ImageRefused(
                    what=self._what, cause=f"{response.url.host} sent more than {limit} bytes where a small document belongs"
                )
        return bytes(data)

    @asynccontextmanager
    async def _get(self, path: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a GET, after scheme, authorization and redirects are settled. Raises Broken for 429 and 5xx."""
        response = await self._settled(path, headers)
        try:
            if response.status == 429 or response.status >= 500:
                failure = await self._refusal(response, path)
                after = response.headers.get("Retry-After", "")
                raise Broken(failure, float(after) if after.isascii() and after.isdigit() else 0)
            yield response
        finally:
            response.close()

    async def _settled(self, path: str, headers: dict[str, str]) -> aiohttp.ClientResponse:
        while True:
            scheme = self._schemes[0]
            try:
                response = await self._followed(URL(f"{scheme}://{self._host}{path}", encoded=True), headers)
                if response.status != 401:
                    break
                offered = credentials.challenges(", ".join(response.headers.getall("WWW-Authenticate", [])))
                refusal = await self._refusal(response, path)
                response.close()
                if not await self._authorise(offered, refusal):
                    raise refusal
                response = await self._followed(URL(f"{scheme}://{self._host}{path}", encoded=True), headers)
                break
            except _SpeaksPlain as plain:
                if len(self._schemes) == 1:
                    raise plain.failure from plain
                self._schemes.pop(0)  # a loopback registry without TLS
        self._schemes = self._schemes[:1]  # it has answered: the other scheme is not tried any more
        return response

    async def _followed(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        origin = url.origin()
        for _ in range(REDIRECTS):
            mine = (
                {**headers, "Authorization": self._authorization} if self._authorization and url.origin() == origin else headers
            )
            response = await self._request("GET", url, mine)
            if response.status not in (301, 302, 303, 307, 308) or "Location" not in response.headers:
                return response
            response.close()
            target = url.join(self._place(response, response.headers["Location"]))
            if target.scheme not in ("http", "https") or (url.scheme == "https" and target.scheme == "http"):
                raise self._odd(response, f"it redirects to {target.with_query(None)}, which is not https")
            url = target
        raise RegistryUnavailable(what=self._what, cause=f"{self._host} redirects more than {REDIRECTS} times")

    def _place(self, response: aiohttp.ClientResponse, text: str) -> URL:
        try:
            return URL(text, encoded=True)
        except ValueError as error:
            raise self._odd(response, f"it redirects to {text[:200]!r}, which is no URL") from error

    async def _request(
        self, method: str, url: URL, headers: dict[str, str], data: dict[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(
            total=None, connect=None, sock_connect=self._patience.connect_s, sock_read=self._patience.stall_s
        )
        proxy = proxy_for(url.scheme, url.host or "", url.port or 0)
        with self._translated(url, proxy):
            return await self._session.request(
                method, url, headers=headers, data=data, proxy=proxy, timeout=timeout, allow_redirects=False
            )

    # Who we are

    async def _authorise(self, offered: list[Challenge], refusal: Failure) -> bool:
        """Get what the challenge asks for; False if nothing that we have could serve."""
        schemes = {challenge.scheme: challenge.parameters for challenge in offered}
        used = self._authorization
        if "bearer" in schemes:
            if self._auth is not None and self._auth.registry_token:
                self._authorization = f"Bearer {self._auth.registry_token}"
            else:
                self._authorization = f"Bearer {await self._token(schemes['bearer'], refusal)}"
                return True
        elif "basic" in schemes:
            pair = credentials.basic(self._auth) if self._auth is not None else None
            if pair is None:
                raise AuthenticationRequired(
                    what=self._what,
                    cause=f"{self._host}: no basic auth credentials",
                    evidence=refusal.evidence,
                    remedy=_REMEDY,
                )
            self._authorization = _basic(*pair)
        return self._authorization != used

    async def _token(self, challenge: dict[str, str], refusal: Failure) -> str:
        try:
            realm = URL(challenge.get("realm", ""))
        except ValueError:
            realm = URL()
        if realm.scheme not in ("http", "https") or not realm.host:
            raise RegistryUnavailable(
                what=self._what, cause=f"{self._host} asks for a token without saying where", evidence=refusal.evidence
            )
        pair = credentials.basic(self._auth) if self._auth is not None else None
        secret = pair is not None or (self._auth is not None and bool(self._auth.identity_token))
        if secret and realm.scheme == "http" and self._schemes[0] == "https":
            cause = f"{self._host} wants the credentials sent in plain http, to {realm.host}"
            raise RegistryUnavailable(what=self._what, cause=cause, remedy="mend the registry's token realm")
        scope = challenge.get("scope") or f"repository:{self._reference.path}:pull"
        query = {"service": challenge.get("service", ""), "scope": scope}
        query = {key: value for key, value in query.items() if value}
        if self._auth is not None and self._auth.identity_token:
            form = {"grant_type": "refresh_token", "client_id": "nacre", "refresh_token": self._auth.identity_token, **query}
            response = await self._request("POST", realm, {}, form)
        else:
            headers = {"Authorization": _basic(*pair)} if pair is not None else {}
            response = await self._request("GET", realm.update_query(query), headers)
        try:
            return await self._read_token(response, realm, given=secret)
        finally:
            response.close()

    async def _read_token(self, response: aiohttp.ClientResponse, realm: URL, *, given: bool) -> str:
        if response.status in (400, 401, 403, 404):
            cause = f"the token server {realm.host} refuses " + ("the credentials given" if given else "anonymous access")
            raise AuthenticationRequired(what=self._what, cause=cause, evidence=await self._evidence(response), remedy=_REMEDY)
        if response.status != 200:
            raise Broken(self._odd(response, f"the token server answers {response.status}"))
        try:
            document = json.loads(await self._body(response, _TOKEN_LIMIT))
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._odd(response, "the token server's answer holds no token")
        return token

    # What went wrong

    async def _refusal(self, response: aiohttp.ClientResponse, thing: str) -> Failure:
        """The failure for a status that is not what was wanted."""
        status, evidence = response.status, await self._evidence(response)
        if status == 404:
            remedy = "check the name and the tag; a private image also looks like this to some registries"
            return ImageNotFound(what=self._what, cause=f"{thing}: not found", evidence=evidence, remedy=remedy)
        if status in (401, 403):
            given = "with the credentials given" if self._auth is not None else "without credentials"
            cause = f"pull access denied by {self._host} {given} (HTTP {status}), repository does not exist or may require authorization"
            return AuthenticationRequired(what=self._what, cause=cause, evidence=evidence, remedy=_REMEDY)
        words = {429: "too many requests"}.get(status, response.reason or "")
        remedy = "wait, or log in: anonymous pulls are counted by address" if status == 429 else ""
        return RegistryUnavailable(
            what=self._what, cause=f"{self._host} answers {status} {words}".rstrip(), evidence=evidence, remedy=remedy
        )

    def _odd(self, response: aiohttp.ClientResponse, cause: str) -> RegistryUnavailable:
        return RegistryUnavailable(what=self._what, cause=f"{response.url.host}: {cause}")

    async def _evidence(self, response: aiohttp.ClientResponse) -> tuple[str, ...]:
        """The registry's own words (distribution spec "Error Codes"), or the first line of whatever it sent."""
        try:
            async with asyncio.timeout(self._patience.connect_s):
                data = await response.content.read(_BODY_SHOWN)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return ()
        try:
            errors = json.loads(data)["errors"]
            return tuple(f"{one.get('code', '')}: {one.get('message', '')}"[:500] for one in errors)
        except (ValueError, LookupError, TypeError, AttributeError):
            line = data.decode("utf-8", "replace").strip().split("\n")[0][:200]
            return (f"HTTP {response.status}: {line}",) if line else ()

    @contextmanager
    def _translated(self, url: URL, proxy: str | None = None) -> Iterator[None]:
        """aiohttp's and the socket's exceptions, as failures that say where."""
        place = f"{url.host}:{url.port}"
        via = () if proxy is None else (f"through the proxy {URL(proxy).with_user(None)} of the environment",)
        try:
            yield
        except aiohttp.ClientConnectorCertificateError as error:
            raise self._certificate(place, error.certificate_error, via) from error
        except aiohttp.ClientSSLError as error:
            raise self._tls(url, place, error.os_error, via) from error
        except aiohttp.ClientConnectorError as error:
            raise Broken(self._connect(url, place, error.os_error, via)) from error
        except TimeoutError as error:
            connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
            wait = self._patience.connect_s if connecting else self._patience.stall_s
            doing = "connect: i/o timeout: no answer" if connecting else "no byte came"
            raise Broken(self._unreachable(f"{place}: {doing} in {wait:g} s", via)) from error
        except aiohttp.ClientHttpProxyError as error:  # whose own words show the proxy's password
            raise Broken(self._unreachable(f"{place}: the proxy answers {error.status} {error.message}", via)) from error
        except (aiohttp.ClientError, OSError) as error:
            said = str(error) or type(error).__name__
            raise Broken(self._unreachable(f"{place}: the connection broke: {said}", via)) from error

    def _unreachable(self, cause: str, evidence: tuple[str, ...], remedy: str = "") -> RegistryUnreachable:
        return RegistryUnreachable(what=self._what, cause=cause, evidence=evidence, remedy=remedy or "nacre doctor")

    def _connect(self, url: URL, place: str, error: OSError, via: tuple[str, ...]) -> RegistryUnreachable:
        if isinstance(error, socket.gaierror):
            return self._unreachable(
                f"lookup {url.host}: no such host ({error.strerror})", via, "check the name and /etc/resolv.conf"
            )
        said = error.strerror or str(error) or "the connection was closed during the TLS handshake"
        return self._unreachable(f"connect {place}: {said[:1].lower()}{said[1:]}", via)

    def _certificate(self, place: str, error: Exception, via: tuple[str, ...]) -> RegistryUnreachable:
        said = getattr(error, "verify_message", "") or str(error)
        cause = f"{place}: tls: failed to verify certificate: x509: {said}"
        remedy = "put the registry's CA into /usr/local/share/ca-certificates as NAME.crt, run update-ca-certificates, restart the node"
        return self._unreachable(cause, via, remedy)

    def _tls(self, url: URL, place: str, error: OSError, via: tuple[str, ...]) -> Exception:
        reason = getattr(error, "reason", "") or str(error)
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._certificate(place, error, via)
        if any(word in str(reason) for word in _PLAIN):
            line = f'insecure_registries = ["{self._reference.domain}"]'
            cause = f"{place}: http: server gave HTTP response to HTTPS client: this registry speaks plain http"
            failure = self._unreachable(cause, via, f"if that is meant, write {line} into {self._settings} and restart the node")
            return _SpeaksPlain(failure) if url.host == URL(f"http://{self._host}").host else failure
        return Broken(self._unreachable(f"{place}: tls handshake failed: {reason}", via))


class _SpeaksPlain(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


_REMEDY = "name credentials for this registry in the pod's imagePullSecrets, or check those that are there"


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
