"""What a container says and hears: logs in CRI format, ExecSync, exec and attach over WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import aiohttp
import grpc
import pytest
from cri_support import FOREVER, Cri, log_lines, refused, stream, until

from nacre.wire import cri_pb2 as cri

MIB = 1 << 20


def test_log_lines_are_stamped_split_at_16_kib_and_an_open_tail_is_partial(service: Cri) -> None:
    with service.pod() as pod:
        script = "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf tail"
        service.ended(pod.start("sh", "-c", script, name="log"))
        lines = until(lambda: (found := log_lines(pod.log_path("log"))) and any(line.text == "tail" for line in found) and found)
        out = [(line.full, len(line.text)) for line in lines if line.stream == "stdout"]
        assert out == [(True, 3), (False, 16384), (False, 16384), (True, 40000 - 2 * 16384), (False, 4)]
        assert [line.text for line in lines if line.stream == "stderr"] == ["err"]
        assert pod.log_path("log").stat().st_mode & 0o777 == 0o640


def test_a_rotated_log_is_reopened_without_losing_a_line(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start("sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.001; done", name="count")
        path = pod.log_path("count")
        for number in range(3):
            until(lambda: path.exists() and len(path.read_bytes()) > 2000)
            path.rename(f"{path}.{number}")
            service.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=made))
        service.stop_container(made, 0)
        parts = [Path(f"{path}.{number}") for number in range(3)] + [path]
        numbers = [int(line.text) for part in parts for line in log_lines(part)]
        assert numbers == list(range(len(numbers))) and len(numbers) > 100


def test_a_failed_reopen_says_why_and_keeps_the_old_file(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start("sh", "-c", "read x; echo after", name="log", stdin=True)
        directory = pod.log_path("log").parent
        directory.rename(f"{directory}.away")
        _code, failure = refused(lambda: service.runtime.ReopenContainerLog(cri.ReopenContainerLogRequest(container_id=made)))
        assert "No such file" in failure.cause
        Path(f"{directory}.away").rename(directory)
        attach(service, made, stdin=b"go\n")
        until(lambda: pod.text("log") == "after\n")


def test_a_full_disk_holds_the_container_up_says_so_and_loses_nothing(service: Cri) -> None:
    logs = service.prefix / "small"
    logs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", logs], check=True)
    try:
        with service.pod("full", log_directory=str(logs)) as pod:
            filler = logs / "filler"
            filler.write_bytes(b"x" * 128 * 1024)
            made = pod.start("sh", "-c", "seq 1 20000; sleep 1000", name="log")
            status = until(lambda: (s := service.status(made)).reason == "LogBlocked" and s)
            assert "No space left on device" in status.message and str(logs) in status.message
            assert service.sh(made, "echo alive") == "alive\n"
            service.stop_container(made, 0)
            filler.unlink()
            assert service.ended(made).reason == "Error"
    finally:
        subprocess.run(["umount", logs], check=True)
        logs.rmdir()


def test_a_log_that_can_be_written_again_goes_on_where_it_stopped(service: Cri) -> None:
    logs = service.prefix / "small"
    logs.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", logs], check=True)
    try:
        with service.pod("refilled", log_directory=str(logs)) as pod:
            filler = logs / "filler"
            filler.write_bytes(b"x" * 3900 * 1024)
            made = pod.start("sh", "-c", "seq 1 30000", name="log")
            until(lambda: service.status(made).reason == "LogBlocked")
            filler.unlink()
            assert service.ended(made).reason == "Completed"
            until(lambda: pod.text("log").split() == [str(number) for number in range(1, 30001)])
    finally:
        subprocess.run(["umount", logs], check=True)
        logs.rmdir()


def test_exec_sync_gives_output_and_code_and_waits_for_who_holds_it_open(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        answer = service.exec(made, "sh", "-c", "echo out; echo err >&2; exit 3")
        assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 3)
        answer = service.exec(made, "sh", "-c", "(sleep 0.2; echo late) & echo early")
        assert answer.stdout == b"early\nlate\n"


def test_exec_sync_fails_as_an_rpc_for_a_missing_binary_a_timeout_and_too_much_output(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        _code, failure = refused(lambda: service.exec(made, "nosuch"))
        assert "nosuch" in failure.sentence() and "not found" in failure.sentence()
        code, failure = refused(lambda: service.exec(made, "sleep", "100", timeout_s=1))
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED and "within 1 s" in failure.cause
        code, _failure = refused(lambda: service.exec(made, "dd", "if=/dev/zero", "bs=1M", "count=17"))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        until(lambda: service.sh(made, "ps -o comm | grep -c -e '^dd$' -e 'sleep 100'; true").strip() == "0")


def test_exec_in_a_container_that_has_ended_is_refused(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start("true")
        service.ended(made)
        code, failure = refused(lambda: service.exec(made, "true"))
        assert code == grpc.StatusCode.FAILED_PRECONDITION and "exited" in failure.cause


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v5.channel.k8s.io"])
def test_a_streamed_exec_keeps_the_streams_apart_and_ends_with_the_exit_code(service: Cri, protocol: str) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        got = stream(execute(service, made, "sh", "-c", "echo out; echo err >&2; exit 4"), protocol=protocol)
        assert (got.protocol, got.out, got.err) == (protocol, b"out\n", b"err\n")
        assert got.status["reason"] == "NonZeroExitCode"
        assert got.status["details"]["causes"] == [{"reason": "ExitCode", "message": "4"}]
        assert stream(execute(service, made, "true")).status["status"] == "Success"


def test_streamed_input_arrives_whole_and_its_end_is_seen(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        data = os.urandom(3 * MIB)
        assert stream(execute(service, made, "cat", stdin=True), stdin=data).out == data


def test_a_failing_streamed_exec_says_why(service: Cri) -> None:
    with service.pod() as pod:
        got = stream(execute(service, pod.start(*FOREVER), "nosuch"))
        assert got.status["status"] == "Failure" and "nosuch" in got.status["message"]


def test_a_stream_url_works_once(service: Cri) -> None:
    with service.pod() as pod:
        url = execute(service, pod.start(*FOREVER), "true")
        assert stream(url).status["status"] == "Success"
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            stream(url)
        assert caught.value.status == 404


def test_a_terminal_is_one_and_takes_its_size(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        size = bytes([4]) + json.dumps({"Width": 123, "Height": 45}).encode()
        script = "test -t 0 && test -t 1 && echo tty; while [ \"$(stty size 2>/dev/null)\" != '45 123' ]; do :; done; echo sized; exit 6"
        url = service.runtime.Exec(
            cri.ExecRequest(container_id=made, cmd=["sh", "-c", script], tty=True, stdin=True, stdout=True)
        ).url
        got = stream(url, first=(size,))
        assert got.out.replace(b"\r", b"") == b"tty\nsized\n" and got.status["details"]["causes"][0]["message"] == "6"


def test_a_client_that_leaves_takes_its_command_with_it(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)

        async def leave() -> None:
            url = execute(service, made, "sh", "-c", "echo up; exec sleep 7654")
            async with aiohttp.ClientSession() as session, session.ws_connect(url, protocols=("v5.channel.k8s.io",)) as ws:
                assert (await ws.receive()).data == b"\1up\n"

        asyncio.run(leave())
        until(lambda: service.sh(made, "ps -o args | grep -c '[s]leep 7654'; true").strip() == "0")


@pytest.mark.parametrize(
    ("command", "most"),
    [
        ("cat", sys.maxsize),  # until nothing more is taken, on any channel
        ("sleep 7655", 256 * 1024),  # more than the command's pipe and the server take; TCP itself still has room to tell the end
    ],
)
def test_a_client_that_dies_while_its_input_waits_leaves_nothing(service: Cri, command: str, most: int) -> None:
    assert service.process is not None
    descriptors = f"/proc/{service.process.pid}/fd"
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        stream(execute(service, made, "true"))
        before = len(os.listdir(descriptors))

        async def flood() -> None:
            url = execute(service, made, *command.split(), stdin=True)
            async with aiohttp.ClientSession() as session, session.ws_connect(url, protocols=("v5.channel.k8s.io",)) as ws:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        for _ in range(0, most, 32768):  # nothing is received meanwhile: what the command says waits too
                            await ws.send_bytes(b"\0" + bytes(32768))
                assert ws._conn is not None and ws._conn.transport is not None
                ws._conn.transport.abort()

        asyncio.run(flood())
        until(lambda: service.sh(made, f"ps -o args | grep -c '^{command}'; true").strip() == "0")
        until(lambda: len(os.listdir(descriptors)) <= before)


@pytest.mark.parametrize("size_mib", [48, pytest.param(1024, marks=pytest.mark.slow)])
def test_much_data_passes_through_exec_in_bounded_memory(service: Cri, size_mib: int) -> None:
    with service.pod() as pod:
        made = pod.start(*FOREVER)
        watched = [service.process.pid, service.shim(pod.id)]  # type: ignore[union-attr]  # it runs
        before = [resident_kib(pid) for pid in watched]
        peak = list(before)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                for number, pid in enumerate(watched):
                    peak[number] = max(peak[number], resident_kib(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        received = asyncio.run(_discard(execute(service, made, "dd", "if=/dev/zero", "bs=64k", f"count={size_mib * 16}")))
        over.set()
        watcher.join()
        assert received == size_mib * MIB
        assert all(most - first < 24 * 1024 for most, first in zip(peak, before, strict=True))


def test_attach_hears_and_feeds_the_containers_own_process(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start(
            "sh", "-c", "while read line; do echo heard $line; done; echo over; exit 2", name="main", stdin=True, stdin_once=True
        )
        got = attach(service, made, stdin=b"one\ntwo\n")
        assert got == b"heard one\nheard two\nover\n"
        assert service.ended(made).exit_code == 2
        assert pod.text("main") == got.decode()


def test_without_stdin_once_the_input_outlives_a_client(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start("sh", "-c", "while read line; do echo heard $line; done; echo over", name="main", stdin=True)

        async def say(word: bytes) -> None:
            url = service.runtime.Attach(cri.AttachRequest(container_id=made, stdin=True, stdout=True, stderr=True)).url
            async with aiohttp.ClientSession() as session, session.ws_connect(url, protocols=("v5.channel.k8s.io",)) as ws:
                await ws.send_bytes(b"\0" + word + b"\n")
                assert (await ws.receive()).data == b"\1heard " + word + b"\n"

        asyncio.run(say(b"one"))
        asyncio.run(say(b"two"))
        assert service.status(made).state == cri.CONTAINER_RUNNING and pod.text("main") == "heard one\nheard two\n"


def test_a_containers_terminal_can_be_attached_and_logged(service: Cri) -> None:
    with service.pod() as pod:
        made = pod.start("sh", "-c", "test -t 0 && echo tty; read x; echo got $x; exit 0", name="main", stdin=True, tty=True)
        url = service.runtime.Attach(cri.AttachRequest(container_id=made, stdin=True, stdout=True, tty=True)).url
        assert b"got word" in stream(url, first=(b"\0word\n",)).out
        assert service.ended(made).exit_code == 0
        assert "tty" in pod.text("main") and "got word" in pod.text("main")


def test_a_client_that_reads_nothing_holds_up_its_container_and_nothing_else(service: Cri) -> None:
    with service.pod() as pod:
        loud = pod.start("sh", "-c", "read go; while :; do seq 1 1000; done", name="loud", stdin=True)
        other = pod.start(*FOREVER)

        async def hang() -> None:
            url = service.runtime.Attach(cri.AttachRequest(container_id=loud, stdin=True, stdout=True)).url
            async with aiohttp.ClientSession() as session:
                ws = await session.ws_connect(url, protocols=("v5.channel.k8s.io",), max_msg_size=0)
                await ws.send_bytes(b"\0go\n")
                ws._response.connection.transport.pause_reading()  # type: ignore[union-attr]  # the way not to read
                sizes = [-1]
                while sizes[-1] != (now := pod.log_path("loud").stat().st_size) or now == 0:
                    sizes.append(now)
                    await asyncio.sleep(0.5)
                assert await asyncio.to_thread(service.sh, other, "echo alive") == "alive\n"
                ws._response.connection.transport.abort()  # type: ignore[union-attr]

        asyncio.run(hang())
        size = pod.log_path("loud").stat().st_size
        until(lambda: pod.log_path("loud").stat().st_size > size)  # the client has left: the container goes on
        service.stop_container(loud, 0)


def execute(service: Cri, container: str, *command: str, stdin: bool = False) -> str:
    request = cri.ExecRequest(container_id=container, cmd=command, stdin=stdin, stdout=True, stderr=True)
    return str(service.runtime.Exec(request).url)


def attach(service: Cri, container: str, stdin: bytes) -> bytes:
    """What is heard until the container or the input ends."""
    request = cri.AttachRequest(container_id=container, stdin=True, stdout=True, stderr=True)
    return stream(service.runtime.Attach(request).url, stdin=stdin).out


def resident_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))


async def _discard(url: str) -> int:
    """Bytes of stdout until the end."""
    count = 0
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, protocols=("v5.channel.k8s.io",), max_msg_size=0) as ws,
    ):
        async for message in ws:
            count += len(message.data) - 1 if message.data[0] == 1 else 0
    return count
