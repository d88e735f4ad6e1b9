"""The CRI's methods as gRPC knows them, for both package names (cri-api, `runtime.v1` and `runtime.v1alpha2`).

The two packages have the same field numbers, so one set of messages serves both. We need no generated stubs: a server
registers `handlers(servicer)`, a client makes `Stub(channel)`.
"""

from __future__ import annotations

import json
from typing import Any

import grpc

from nacre.oci.errors import Failure, Unsupported, decode, encode
from nacre.wire import cri_pb2

PACKAGES = ("runtime.v1", "runtime.v1alpha2")
MESSAGE_LIMIT = 16 * 1024 * 1024  # bytes, both ways; what containerd and the kubelet agree on
CHANNEL_OPTIONS = (("grpc.max_send_message_length", MESSAGE_LIMIT), ("grpc.max_receive_message_length", MESSAGE_LIMIT))

PROGRESS = "nacre.dev/progress"  # key of a verbose Status' info: what takes its time, a JSON object of {subject: words}


def progress_of(kind: str, name: str) -> str:
    """The subject of PROGRESS that a `handler` or an `image` is."""
    return f"{kind} {name}"


def handlers(service: str, servicer: object) -> list[grpc.GenericRpcHandler]:
    """gRPC handlers of `service` ("RuntimeService" or "ImageService") under both packages.

    `servicer` has a coroutine method (an async generator for streamed answers) named as the method; a method that it lacks
    answers Unimplemented, in a sentence.
    """
    table = {}
    for method in cri_pb2.DESCRIPTOR.services_by_name[service].methods:
        implementation = getattr(servicer, method.name, None) or _not_offered(method.name)
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        table[method.name] = make(implementation, _message(method.input_type.name).FromString, _serialize)
    return [grpc.method_handlers_generic_handler(f"{package}.{service}", table) for package in PACKAGES]


def _not_offered(method: str) -> Any:
    async def refuse(_request: Any, context: Any) -> None:
        await abort(context, Unsupported(what=f"answer {method}", cause="this nacre does not offer it yet"))

    return refuse


class Stub:
    """A client of one CRI service: `await Stub(channel, "RuntimeService").Version(cri_pb2.VersionRequest())`.

    `channel` is a grpc.aio channel (or a blocking one: then calls block). Raises grpc.RpcError.
    """

    def __init__(self, channel: Any, service: str, package: str = PACKAGES[0]) -> None:
        for method in cri_pb2.DESCRIPTOR.services_by_name[service].methods:
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            path = f"/{package}.{service}/{method.name}"
            call = make(path, request_serializer=_serialize, response_deserializer=_message(method.output_type.name).FromString)
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:  # only reached for a name that is no method: says so, and tells mypy the type
        raise AttributeError(f"the CRI has no method {name}")


METADATA = "nacre-failure-bin"  # trailing metadata: the Failure, whole, as JSON
_STATUS = {
    "NotFound": grpc.StatusCode.NOT_FOUND,
    "AlreadyExists": grpc.StatusCode.ALREADY_EXISTS,
    "Invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "Unsupported": grpc.StatusCode.UNIMPLEMENTED,
    "WrongStatus": grpc.StatusCode.FAILED_PRECONDITION,
    "ExecTimeout": grpc.StatusCode.DEADLINE_EXCEEDED,
    "OutputTooLarge": grpc.StatusCode.RESOURCE_EXHAUSTED,
}


async def abort(context: Any, failure: Failure) -> None:
    """End a call with `failure`: its sentence as details, all of it in the metadata. Always raises, as gRPC wants."""
    metadata = ((METADATA, json.dumps(encode(failure)).encode()),)
    await context.abort(_STATUS.get(failure.code, grpc.StatusCode.UNKNOWN), failure.sentence(), trailing_metadata=metadata)


def failure_of(error: Any, what: str) -> Failure:
    """The Failure behind a grpc.RpcError; a foreign service's error becomes one with its own words as cause."""
    for key, value in error.trailing_metadata() or ():
        if key == METADATA:
            return decode(json.loads(value))
    return Failure(what=what, cause=f"rpc error: code = {error.code().name} desc = {error.details()}")


def _message(name: str) -> Any:
    return getattr(cri_pb2, name)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
