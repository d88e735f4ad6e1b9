"""The CRI's methods as gRPC knows them, for both package names (cri-api, `runtime.v1` and `runtime.v1alpha2`).

The two packages have the same field numbers, so one set of messages serves both. We need no generated stubs: a server
registers `handlers(servicer)`, a client makes `Stub(channel)`.
"""

from __future__ import annotations

from typing import Any

import grpc

from nacre.wire import cri_pb2

PACKAGES = ("runtime.v1", "runtime.v1alpha2")
MESSAGE_LIMIT = 16 * 1024 * 1024  # bytes, both ways; what containerd and the kubelet agree on
CHANNEL_OPTIONS = (("grpc.max_send_message_length", MESSAGE_LIMIT), ("grpc.max_receive_message_length", MESSAGE_LIMIT))


def handlers(service: str, servicer: object) -> list[grpc.GenericRpcHandler]:
    """gRPC handlers of `service` ("RuntimeService" or "ImageService") under both packages.

    `servicer` has a coroutine method (an async generator for streamed answers) named as the method; a method that it lacks
    answers Unimplemented.
    """
    table = {}
    for method in cri_pb2.DESCRIPTOR.services_by_name[service].methods:
        implementation = getattr(servicer, method.name, None)
        if implementation is None:
            continue
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        table[method.name] = make(implementation, _message(method.input_type.name).FromString, _serialize)
    return [grpc.method_handlers_generic_handler(f"{package}.{service}", table) for package in PACKAGES]


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


def _message(name: str) -> Any:
    return getattr(cri_pb2, name)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
