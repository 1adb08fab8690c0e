"""A wire to a database server that is cut in the middle of a commit: before the server hears it, or after."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Self


class Cut(enum.Enum):
    COMMIT = "the server never hears of the commit"
    ANSWER = "it commits, and its answer is lost"


class LossyWire:
    """Listens on loopback. `cut` says what happens at the next commit; each happens once."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.port = 0
        self.cut: Cut | None = None
        self._answer_lost = False
        self._serving: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator[tuple[Self, str]]:
        """The wire, and the URL to use instead."""
        head, port, name = url.rpartition(":")[0], *url.rpartition(":")[2].split("/")
        wire = cls(int(port))
        server = await asyncio.start_server(wire._accept, "127.0.0.1", 0)
        wire.port = server.sockets[0].getsockname()[1]
        try:
            yield wire, f"{head}:{wire.port}/{name}"
        finally:
            server.close()
            await asyncio.gather(*wire._serving)  # until both ends have hung up

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except ConnectionError:  # the server is down
            writer.close()
            return
        ways = {
            asyncio.create_task(self._requests(reader, to_server)),
            asyncio.create_task(self._answers(from_server, writer)),
        }
        _, left = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in left:
            way.cancel()
        for end in (writer, to_server):
            end.close()

    async def _requests(self, reader: asyncio.StreamReader, to_server: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while content := await reader.read(1 << 16):
                if b"COMMIT\0" in content and self.cut is not None:
                    cut, self.cut = self.cut, None
                    if cut is Cut.COMMIT:
                        return
                    self._answer_lost = True
                to_server.write(content)
                await to_server.drain()

    async def _answers(self, from_server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while content := await from_server.read(1 << 16):
                if self._answer_lost:
                    self._answer_lost = False
                    return
                writer.write(content)
                await writer.drain()
