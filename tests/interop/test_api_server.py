"""What clients other than kubectl rely on: watches, pages, preconditions, identities, restarts. Spoken with nacre's own client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yarl
from api_support import Node, running

from nacre.wire.kube import ApiError, Kube, Unreachable, client_context, reflect

PODS = "/api/v1/namespaces/default/pods"
MAPS = "/api/v1/namespaces/default/configmaps"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with running(tmp_path_factory.mktemp("node")) as found:
        yield found


@pytest.fixture
async def kube(node: Node) -> AsyncIterator[Kube]:
    async with client(node, "admin") as found:
        yield found
        for path in (PODS, MAPS):
            await found.delete(path, {"gracePeriodSeconds": 0}, labelSelector="test")


def client(node: Node, name: str) -> Kube:
    return Kube(node.url, client_context(str(node.pki), name))


def config_map(name: str, **data: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": {"test": "x"}}, "data": data}


def pod(name: str, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "labels": {"test": "x"}}
    return {"metadata": meta, "spec": {"containers": [{"name": "c", "image": "i"}], **spec}}


async def take(events: AsyncIterator[Any], count: int) -> list[Any]:
    async with asyncio.timeout(10):
        return [await anext(events) for _ in range(count)]


async def refused(call: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await call
    return caught.value


# ---- watches


async def test_a_watch_list_sends_what_is_then_its_end_then_what_comes(kube: Kube) -> None:
    await kube.create(MAPS, config_map("a"))
    asked = {"sendInitialEvents": True, "resourceVersionMatch": "NotOlderThan", "labelSelector": "test"}
    async with contextlib.aclosing(kube.watch(MAPS, **asked)) as events:
        first, end = await take(events, 2)
        assert (first["type"], first["object"]["metadata"]["name"]) == ("ADDED", "a")
        assert end["type"] == "BOOKMARK"
        assert end["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}
        made = await kube.create(MAPS, config_map("b"))
        assert (await take(events, 1))[0]["object"] == made


async def test_a_watch_list_without_its_match_is_invalid(kube: Kube) -> None:
    error = await refused(anext(kube.watch(MAPS, sendInitialEvents=True)))
    assert error.code == 422
    assert "resourceVersionMatch" in error.message


async def test_an_object_enters_and_leaves_a_selection(kube: Kube) -> None:
    await kube.create(MAPS, config_map("a"))
    version = (await kube.get(MAPS))["metadata"]["resourceVersion"]
    async with contextlib.aclosing(kube.watch(MAPS, version, labelSelector="colour=red")) as events:
        for colour in ("red", "red", "blue"):
            labels = {"colour": colour, "count": str(len(colour)) if colour == "blue" else colour}
            await kube.patch(f"{MAPS}/a", {"metadata": {"labels": labels}, "data": {"n": colour + version}}, "merge")
        assert [event["type"] for event in await take(events, 2)] == ["ADDED", "DELETED"]


async def test_a_watch_ends_at_its_timeout_with_a_bookmark(kube: Kube) -> None:
    version = (await kube.get(MAPS))["metadata"]["resourceVersion"]
    assert [event["type"] async for event in kube.watch(MAPS, version, timeoutSeconds=1)] == ["BOOKMARK"]


async def test_a_watch_from_a_future_or_forgotten_revision_is_expired(kube: Kube) -> None:
    error = await refused(anext(kube.watch(MAPS, "99999999")))
    assert (error.code, error.reason) == (410, "Expired")


async def test_reflect_survives_the_servers_death_and_misses_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as node:
        async with client(node, "admin") as kube:
            changes = reflect(kube, MAPS, labelSelector="test")
            assert await anext(changes) == ("SYNCED", None)
            await kube.create(MAPS, config_map("a"))
            assert (await anext(changes))[0] == "ADDED"
            port = node.port
            node.kill()
            with pytest.raises(Unreachable):
                await kube.get(MAPS)
            await asyncio.to_thread(node.start)
            assert node.port == port
            assert (await kube.get(f"{MAPS}/a"))["metadata"]["name"] == "a"
            await kube.delete(f"{MAPS}/a")
            async with asyncio.timeout(10):
                assert [await anext(changes)][0][0] == "DELETED"
            await changes.aclose()


# ---- lists


async def test_pages_are_of_one_moment(kube: Kube) -> None:
    for name in "abcde":
        await kube.create(MAPS, config_map(f"page-{name}"))
    first = await kube.get(MAPS, limit=2)
    assert first["metadata"]["remainingItemCount"] >= 3
    await kube.create(MAPS, config_map("page-zz"))
    token, names = first["metadata"]["continue"], [item["metadata"]["name"] for item in first["items"]]
    while token:
        page = await kube.get(MAPS, limit=2, **{"continue": token})
        assert page["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
        names += [item["metadata"]["name"] for item in page["items"]]
        token = page["metadata"].get("continue")
    assert [name for name in names if name.startswith("page-")] == [f"page-{name}" for name in "abcde"]


async def test_pages_of_a_selection_hold_all_of_it(kube: Kube) -> None:
    for number in range(7):
        await kube.create(MAPS, config_map(f"s{number}", n=str(number)))
    found: list[str] = []
    token: str | None = ""
    while token is not None:
        page = await kube.get(MAPS, limit=3, labelSelector="test", **({"continue": token} if token else {}))
        found += [item["metadata"]["name"] for item in page["items"]]
        token = page["metadata"].get("continue")
    assert found == [f"s{number}" for number in range(7)]


async def test_a_bad_token_and_a_revision_to_come_are_told(kube: Kube) -> None:
    assert (await refused(kube.get(MAPS, **{"continue": "nonsense"}))).code == 400
    error = await refused(kube.get(MAPS, resourceVersion="99999999", resourceVersionMatch="NotOlderThan"))
    assert (error.code, error.reason) == (504, "Timeout")


# ---- requests nobody sends who means well

JSON, STRATEGIC = "application/json", "application/strategic-merge-patch+json"
MERGE, OPERATIONS, APPLY = "application/merge-patch+json", "application/json-patch+json", "application/apply-patch+yaml"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"
DEEP = b'{"a":' * 900 + b"{}" + b"}" * 900  # Python's decoder takes it, what works through it afterwards does not
ODD_LISTS = [
    *(f"{name}={'9' * count}" for name in ("limit", "resourceVersion", "timeoutSeconds") for count in (30, 400, 5000)),
    *(
        "continue=" + base64.urlsafe_b64encode(text).decode()
        for text in (b"5", b"{}", b"[" * 3000, b'[5, "\\ud800"]', b"[1e9, 7]")
    ),
    "labelSelector=%ff",
    "fieldSelector=%5C%5C,==,",
    "limit=1&continue=%ff",
]
ODD_BODIES = [
    ("POST", "", JSON, b'{"metadata":{"name":"odd"},"data":{"a":"\\ud800"}}'),
    ("POST", "", JSON, b'{"metadata":{"name":"\\ud800"}}'),
    ("POST", "", JSON, b'{"metadata":{"name":"odd","managedFields":[{"operation":"Update","fieldsV1":"text"}]}}'),
    ("POST", "", JSON, b'{"metadata":{"name":"odd","managedFields":[{"operation":"Update","fieldsV1":{"f:data":{"k:{{":{}}}}]}}'),
    ("POST", "", JSON, b'{"metadata":{"name":"odd","managedFields":[{"operation":"Update","fieldsV1":' + DEEP + b"}]}}"),
    ("POST", "?fieldManager=" + "x" * 200, JSON, b'{"metadata":{"name":"odd"}}'),
    ("PATCH", "/held", STRATEGIC, DEEP),
    ("PATCH", "/held", OPERATIONS, b'[{"op":"add","path":"/data","value":' + DEEP + b"}]"),
    ("PATCH", "/held", STRATEGIC, b'{"metadata":{"$retainKeys":5}}'),
    ("PATCH", "/held", STRATEGIC, b'{"metadata":{"$deleteFromPrimitiveList/finalizers":5}}'),
    ("PATCH", "/held", STRATEGIC, b'{"metadata":{"ownerReferences":[5,{"$patch":"replace"}]}}'),
    ("PATCH", "/held", STRATEGIC, b'{"$patch":"delete"}'),
    ("PATCH", "/held", MERGE, b'{"metadata":null}'),
    ("PATCH", "/held", MERGE, b'{"data":{"\\ud800":"x"}}'),
    ("PATCH", "/held", OPERATIONS, b'[{"op":"remove","path":"/metadata"}]'),
    ("PATCH", "/held", APPLY, b'{"data":{"\\ud800":"x"}}'),
    ("DELETE", "/held", JSON, b'{"preconditions":5}'),
    ("DELETE", "/held", JSON, b'{"gracePeriodSeconds":99999999999999999999}'),
]


async def ask(node: Node, method: str, path: str, **more: Any) -> tuple[int, bytes]:
    """(status, body) of a request that nacre's own client would not send."""
    context = client_context(str(node.pki), "admin")
    url = yarl.URL(node.url + path, encoded=True)
    async with aiohttp.ClientSession() as session, session.request(method, url, ssl=context, **more) as answer:
        return answer.status, await answer.read()


@pytest.mark.parametrize("query", ODD_LISTS, ids=lambda query: query[:24])
async def test_an_odd_parameter_is_refused_by_a_status(kube: Kube, node: Node, query: str) -> None:
    code, body = await ask(node, "GET", f"{MAPS}?{query}")
    assert (400 <= code < 500 or code == 504) and json.loads(body)["kind"] == "Status", (code, body)


@pytest.mark.parametrize(("method", "where", "media", "body"), ODD_BODIES, ids=lambda word: str(word)[:40])
async def test_an_odd_body_is_refused_and_changes_nothing(
    kube: Kube, node: Node, method: str, where: str, media: str, body: bytes
) -> None:
    before = await kube.create(MAPS, config_map("held", key="value"))
    headers = {"Content-Type": media, "User-Agent": "odd"}
    code, answer = await ask(node, method, MAPS + where, data=body, headers=headers)
    assert 400 <= code < 500 and json.loads(answer)["kind"] == "Status", (code, answer)
    assert await kube.get(f"{MAPS}/held") == before
    assert [one["metadata"]["name"] for one in (await kube.get(MAPS))["items"] if one["metadata"]["name"] == "odd"] == []


async def test_a_body_that_cannot_be_unpacked_is_a_bad_request(kube: Kube, node: Node) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    code, _ = await ask(node, "POST", MAPS, data=b"\x1f\x8bno gzip at all", headers=headers)
    assert code == 400


async def test_one_odd_event_does_not_hide_the_others(kube: Kube, node: Node) -> None:
    events = "/api/v1/namespaces/default/events"
    about = {"namespace": "default", "name": "web"}
    await kube.create(events, {"metadata": {"name": "old"}, "involvedObject": about, "lastTimestamp": "0001-01-01T00:00:00Z"})
    try:
        code, body = await ask(node, "GET", events, headers={"Accept": TABLE})
        assert code == 200
        ages = {row["object"]["metadata"]["name"]: row["cells"][0] for row in json.loads(body)["rows"]}
        assert ages["old"] == "<unknown>"
    finally:
        await kube.delete(f"{events}/old")


async def test_a_pod_with_an_endless_grace_can_be_deleted(kube: Kube) -> None:
    await kube.create(PODS, pod("patient", nodeName="elsewhere", terminationGracePeriodSeconds=2**62))
    assert (await kube.delete(f"{PODS}/patient"))["metadata"]["deletionTimestamp"]
    await kube.delete(f"{PODS}/patient", {"gracePeriodSeconds": 0})


@pytest.mark.parametrize("key", ["name", "uid", "creationTimestamp"])
async def test_a_patch_cannot_make_another_object_of_it(kube: Kube, key: str) -> None:
    await kube.create(MAPS, config_map("one"))
    error = await refused(kube.patch(f"{MAPS}/one", {"metadata": {key: "2026-01-01T00:00:00Z"}}, "merge"))
    assert error.code == 422
    assert f"metadata.{key}: Invalid value" in error.message
    assert "field is immutable" in error.message


# ---- writes


async def test_a_stale_update_is_a_conflict_and_a_current_one_is_not(kube: Kube) -> None:
    made = await kube.create(MAPS, config_map("a", n="1"))
    made["data"]["n"] = "2"
    second = await kube.update(f"{MAPS}/a", made)
    made["data"]["n"] = "3"
    error = await refused(kube.update(f"{MAPS}/a", made))
    assert (error.code, error.reason) == (409, "Conflict")
    assert "the object has been modified" in error.message
    assert (await kube.update(f"{MAPS}/a", second))["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]


async def test_dry_run_checks_all_and_keeps_nothing(kube: Kube) -> None:
    made = await kube.create(PODS, pod("dry"), dryRun="All")
    assert made["spec"]["dnsPolicy"] == "ClusterFirst"
    assert (await refused(kube.get(f"{PODS}/dry"))).code == 404
    assert (await refused(kube.create(PODS, {"metadata": {"name": "dry"}, "spec": {}}, dryRun="All"))).code == 422
    await kube.create(PODS, pod("dry"))
    assert (await refused(kube.create(PODS, pod("dry"), dryRun="All"))).reason == "AlreadyExists"
    await kube.delete(f"{PODS}/dry", {"dryRun": ["All"]})
    await kube.get(f"{PODS}/dry")


async def test_names_are_generated(kube: Kube) -> None:
    thing = config_map("x")
    del thing["metadata"]["name"]
    thing["metadata"]["generateName"] = "job-"
    names = {(await kube.create(MAPS, thing))["metadata"]["name"] for _ in range(5)}
    assert len(names) == 5
    assert all(name.startswith("job-") and len(name) == 9 for name in names)


async def test_unknown_fields_warn_or_refuse_or_vanish(kube: Kube, node: Node) -> None:
    thing = pod("a") | {"colour": "red"}
    error = await refused(kube.create(PODS, thing, fieldValidation="Strict"))
    assert (error.code, error.reason) == (400, "BadRequest")
    assert 'strict decoding error: unknown field "colour"' in error.message
    async with aiohttp.ClientSession() as session:
        tls = client_context(str(node.pki), "admin")
        async with session.post(node.url + PODS, json=thing, ssl=tls) as answer:
            assert answer.headers["Warning"] == '299 - "unknown field \\"colour\\""'
            assert "colour" not in await answer.json()
        body = b'{"metadata":{"name":"b","labels":{"test":"x"}},"data":{"k":"1","k":"2"}}'
        headers = {"Content-Type": "application/json"}
        async with session.post(node.url + MAPS + "?fieldValidation=Strict", data=body, ssl=tls, headers=headers) as answer:
            assert 'duplicate field \\"data.k\\"' in await answer.text()


async def test_a_pod_that_asks_for_nothing_unusual_meets_no_warning(kube: Kube, node: Node) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.post(node.url + PODS, json=pod("plain"), ssl=client_context(str(node.pki), "admin")) as answer:
            assert answer.status == 201 and "Warning" not in answer.headers


async def test_every_fault_is_named_in_a_cause(kube: Kube) -> None:
    thing = pod("Bad_Name")
    thing["spec"]["containers"] = [{"name": "c", "image": "i", "ports": [{"containerPort": 99999}]}, {"name": "c"}]
    thing["spec"]["restartPolicy"] = "Sometimes"
    error = await refused(kube.create(PODS, thing))
    causes = {(cause["field"], cause["reason"]) for cause in error.status["details"]["causes"]}
    assert causes == {
        ("metadata.name", "FieldValueInvalid"),
        ("spec.containers[0].ports[0].containerPort", "FieldValueInvalid"),
        ("spec.containers[1].name", "FieldValueDuplicate"),
        ("spec.containers[1].image", "FieldValueRequired"),
        ("spec.restartPolicy", "FieldValueNotSupported"),
    }
    assert 'spec.restartPolicy: Unsupported value: "Sometimes": supported values: "Always", "Never", "OnFailure"' in error.message


async def test_a_secrets_text_becomes_data_and_immutable_ones_stay(kube: Kube) -> None:
    path = "/api/v1/namespaces/default/secrets"
    made = await kube.create(path, {"metadata": {"name": "s"}, "stringData": {"k": "v"}, "immutable": True})
    try:
        assert made["data"] == {"k": "dg=="}
        assert "stringData" not in made
        error = await refused(kube.patch(f"{path}/s", {"stringData": {"k": "w"}}, "merge"))
        assert "field is immutable when `immutable` is set" in error.message
        assert [item["metadata"]["name"] for item in (await kube.get(path, fieldSelector="type=Opaque"))["items"]] == ["s"]
    finally:
        await kube.delete(f"{path}/s")


# ---- deleting


async def test_a_running_pod_gets_its_grace_and_the_kubelet_ends_it(kube: Kube, node: Node) -> None:
    made = await kube.create(PODS, pod("graceful", nodeName="elsewhere", terminationGracePeriodSeconds=7))
    marked = await kube.delete(f"{PODS}/graceful")
    assert marked["metadata"]["deletionGracePeriodSeconds"] == 7
    again = await kube.delete(f"{PODS}/graceful")
    assert again["metadata"]["deletionTimestamp"] == marked["metadata"]["deletionTimestamp"]
    shorter = await kube.delete(f"{PODS}/graceful", {"gracePeriodSeconds": 2})
    assert shorter["metadata"]["deletionGracePeriodSeconds"] == 2
    async with client(node, "kubelet") as kubelet:
        wrong = {"gracePeriodSeconds": 0, "preconditions": {"uid": "another"}}
        error = await refused(kubelet.delete(f"{PODS}/graceful", wrong))
        assert error.code == 409
        assert "Precondition failed: UID in precondition: another" in error.message
        await kubelet.delete(f"{PODS}/graceful", {"gracePeriodSeconds": 0, "preconditions": {"uid": made["metadata"]["uid"]}})
    assert (await refused(kube.get(f"{PODS}/graceful"))).code == 404


async def test_a_finalizer_keeps_an_object_until_it_is_taken_away(kube: Kube) -> None:
    thing = config_map("held")
    thing["metadata"]["finalizers"] = ["example.com/keep"]
    await kube.create(MAPS, thing)
    await kube.delete(f"{MAPS}/held")
    held = await kube.get(f"{MAPS}/held")
    assert held["metadata"]["deletionTimestamp"]
    error = await refused(kube.patch(f"{MAPS}/held", {"metadata": {"finalizers": ["a.io/b", "example.com/keep"]}}, "merge"))
    assert "no new finalizers can be added if the object is being deleted" in error.message
    await kube.patch(f"{MAPS}/held", {"metadata": {"finalizers": None}}, "merge")
    assert (await refused(kube.get(f"{MAPS}/held"))).code == 404


async def test_a_pod_is_bound_once(kube: Kube) -> None:
    await kube.create(PODS, pod("bound", schedulerName="mine"))
    binding = {"target": {"kind": "Node", "name": "n7"}}
    await kube.create(f"{PODS}/bound/binding", binding)
    found = await kube.get(f"{PODS}/bound")
    assert found["spec"]["nodeName"] == "n7"
    assert found["status"]["conditions"][0]["type"] == "PodScheduled"
    error = await refused(kube.create(f"{PODS}/bound/binding", binding))
    assert (error.code, 'is already assigned to node "n7"' in error.message) == (409, True)


# ---- identities


async def test_strangers_see_only_the_servers_health(node: Node) -> None:
    context = ssl.create_default_context(cafile=str(node.pki / "ca.crt"))
    async with Kube(node.url, context) as stranger:
        assert (await stranger.get("/version"))["minor"] == "37"
        for path in ("/api", PODS, "/openapi/v3"):
            assert (await refused(stranger.get(path))).code == 401


async def test_a_node_may_what_it_needs_and_no_more(node: Node) -> None:
    async with client(node, "kubelet") as kubelet:
        await kubelet.get("/api/v1/pods")
        error = await refused(kubelet.create(MAPS, config_map("x")))
        assert error.code == 403
        assert "cannot create resource" in error.message
        assert 'in the namespace "default"' in error.message


async def test_events_have_two_names_and_one_store(kube: Kube) -> None:
    core, other = "/api/v1/namespaces/default/events", "/apis/events.k8s.io/v1/namespaces/default/events"
    about = {"kind": "Pod", "name": "web", "namespace": "default"}
    await kube.create(
        core, {"metadata": {"name": "e1"}, "involvedObject": about, "reason": "R", "message": "words", "type": "Normal"}
    )
    try:
        seen = await kube.get(f"{other}/e1")
        assert (seen["regarding"], seen["note"], seen["apiVersion"]) == (about, "words", "events.k8s.io/v1")
        assert [
            item["metadata"]["name"] for item in (await kube.get(core, fieldSelector="involvedObject.name=web"))["items"]
        ] == ["e1"]
    finally:
        await kube.delete(f"{core}/e1")
