"""One stream of a rank, cut into chunks."""

from __future__ import annotations

import asyncio
import base64
import os

import pytest
from phalanx_worker.node.logs import LogBudget, LogStream

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Stream:
    """A LogStream on a pipe, and the chunks that it sent."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.changed = asyncio.Event()
        near, self.far = os.pipe()
        self.stream = LogStream(near, LogBudget(1 << 30), self._emit)

    def _emit(self, offset: int, data: str, _at: float) -> None:
        assert offset == sum(map(len, self.chunks))
        self.chunks.append(base64.b64decode(data))
        self.changed.set()

    async def sent(self, count: int) -> list[bytes]:
        async with asyncio.timeout(10):
            while len(self.chunks) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.chunks

    async def end(self) -> list[bytes]:
        os.close(self.far)
        await asyncio.wait_for(self.stream.ended.wait(), 10)
        return self.chunks


async def test_a_chunk_ends_with_a_line_and_the_rest_waits_for_its_end() -> None:
    stream = Stream()
    os.write(stream.far, b"one\ntwo")
    assert await stream.sent(1) == [b"one\n"]
    os.write(stream.far, b"\nthree\n")
    assert await stream.sent(2) == [b"one\n", b"two\nthree\n"]
    assert await stream.end() == [b"one\n", b"two\nthree\n"]


async def test_a_prompt_without_a_line_end_goes_out_all_the_same() -> None:
    stream = Stream()
    os.write(stream.far, b"continue? ")
    assert await stream.sent(1) == [b"continue? "]
    assert await stream.end() == [b"continue? "]


async def test_a_carriage_return_ends_a_line() -> None:
    stream = Stream()
    os.write(stream.far, b" 10%\r 20%")
    assert await stream.sent(1) == [b" 10%\r"]
    assert await stream.end() == [b" 10%\r", b" 20%"]


async def test_the_end_of_the_stream_sends_what_is_left() -> None:
    stream = Stream()
    os.write(stream.far, b"last words")
    assert await stream.end() == [b"last words"]
