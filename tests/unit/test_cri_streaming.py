"""The stream session's side that foreign bytes reach."""

from __future__ import annotations

import pytest

from nacre.cri.streaming import Session


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b'{"Width": "x", "Height": 1}', b'{"Width": 65536, "Height": 1}', b'{"Width": -1, "Height": 1}',
     b'{"Width": 1e400, "Height": 1}', b"[" * 100_000, b"\xff"],
    ids=lambda data: data[:20],
)  # fmt: skip
async def test_a_size_that_is_none_is_no_reason_to_end_the_session(data: bytes) -> None:
    sizes: list[tuple[int, int]] = []

    async def resize(width: int, height: int) -> None:
        sizes.append((width, height))

    session = Session(None, -1, [])  # type: ignore[arg-type]
    session.on_resize = resize
    await session._resize(data)
    await session._resize(b'{"Width": 120, "Height": 40}\n')
    assert sizes == [(120, 40)]
