"""Changes of files, told to coroutines: the kubelet's one inotify instance, for followed logs and the directory of static manifests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nacre.linux.inotify import Mask, inotify_add_watch, inotify_init, inotify_rm_watch, read_events

FILE = Mask.MODIFY | Mask.MOVE_SELF | Mask.DELETE_SELF | Mask.ATTRIB
DIRECTORY = Mask.CREATE | Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.DELETE | Mask.ONLYDIR


class Watching:
    """Owns the descriptor from the first watch to `close`."""

    def __init__(self) -> None:
        self._fd = -1
        self._waiting: dict[int, list[asyncio.Event]] = {}

    @contextmanager
    def changes(self, path: str, mask: Mask) -> Iterator[asyncio.Event]:
        """An event that is set whenever `path` changed; the caller clears it before it looks. Raises OSError."""
        if self._fd < 0:
            self._fd = inotify_init()
            asyncio.get_running_loop().add_reader(self._fd, self._read)
        watch = inotify_add_watch(self._fd, path, mask)
        event = asyncio.Event()
        self._waiting.setdefault(watch, []).append(event)
        try:
            yield event
        finally:
            self._forget(watch, event)

    def close(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._fd = -1

    def _read(self) -> None:
        for watch, mask, _name in read_events(self._fd):
            everyone = [event for events in self._waiting.values() for event in events]
            for event in everyone if mask & Mask.Q_OVERFLOW else self._waiting.get(watch, []):
                event.set()
            if mask & Mask.IGNORED:  # the file is gone, and its watch with it
                self._waiting.pop(watch, None)

    def _forget(self, watch: int, event: asyncio.Event) -> None:
        events = self._waiting.get(watch)
        if events is None or event not in events:
            return
        events.remove(event)
        if not events:
            del self._waiting[watch]
            if self._fd >= 0:
                inotify_rm_watch(self._fd, watch)
