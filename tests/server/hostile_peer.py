"""A peer that speaks HTTP/2 itself, frame by frame, and not as it should."""

from __future__ import annotations

import socket
import struct
from types import TracebackType

import hpack
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, Event, ResponseReceived, TrailersReceived
from h2.exceptions import ProtocolError

DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0x0, 0x1, 0x3, 0x4, 0x6, 0x9
END_STREAM, END_HEADERS = 0x1, 0x4
SECONDS = 10.0


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(path: str, **others: str) -> list[tuple[str, str]]:
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "127.0.0.1"}
    return [*fields.items(), ("te", "trailers"), *(({"content-type": "application/grpc"} | others).items())]


def header_block(path: str) -> bytes:
    """To be sent on any stream of a connection: it refers to no earlier one."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return bytes(encoder.encode(headers(path)))


class HostilePeer:
    """A connection behind a proper preface. What it sends is up to the test."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), SECONDS)
        self._h2 = H2Connection()
        self._h2.initiate_connection()
        self.send(self._h2.data_to_send())

    def __enter__(self) -> HostilePeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, content: bytes) -> bool:
        """False once the server has hung up, or reads no more."""
        try:
            self.socket.sendall(content)
        except OSError:
            return False
        return True

    def ask(self, path: str, **others: str) -> dict[str, str]:
        """Headers and trailers of the answer to a proper request with an empty message."""
        stream = self._h2.get_next_available_stream_id()
        self._h2.send_headers(stream, headers(path, **others))
        self._h2.send_data(stream, bytes(5), end_stream=True)
        self.send(self._h2.data_to_send())
        answer: dict[str, str] = {}
        while True:
            for event in self.events():
                if isinstance(event, ResponseReceived | TrailersReceived):
                    answer |= {_text(name): _text(value) for name, value in event.headers or ()}
                    if event.stream_ended is not None or isinstance(event, TrailersReceived):
                        return answer

    def events(self) -> list[Event]:
        """What came meanwhile. Raises ConnectionError once the server has hung up."""
        received = self.socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the server has hung up")
        found = self._h2.receive_data(received)
        self.send(self._h2.data_to_send())
        return found

    def farewell(self) -> str:
        """With which words the server ended the connection; "" without any. Waits for the end."""
        words = ""
        try:
            while True:
                for event in self.events():
                    if isinstance(event, ConnectionTerminated):
                        words = _text(event.additional_data or b"") or str(event.error_code)
        except (OSError, ProtocolError):
            return words


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
