"""Peers of one port that come from other addresses of this machine."""

from __future__ import annotations

import asyncio


async def relay_from(address: str, port: int) -> asyncio.Server:
    """Listens on a free port of 127.0.0.1; who dials it comes to `port` from `address`, as 127.0.0.2."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(1 << 16):
            writer.write(content)
            await writer.drain()
        writer.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
        await asyncio.gather(copy(reader, onward[1]), copy(onward[0], writer), return_exceptions=True)

    return await asyncio.start_server(join, "127.0.0.1", 0)
