"""The cheapest server there is, to show what the client itself costs: reads a request to its end, sends fixed bytes."""

from __future__ import annotations

import argparse
import re
import socket

HOST = "127.0.0.1"
ROOM = 16 << 20  # bytes of a request, at most

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def serve(port: int, size: int) -> None:
    """Answer one connection after the other with `size` bytes."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size + b" " * size
    room = bytearray(ROOM)
    with socket.create_server((HOST, port)) as listener:
        while True:
            line, _ = listener.accept()
            with line:
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while _read(line, room):
                    line.sendall(answer)


def _read(line: socket.socket, room: bytearray) -> bool:
    """Read one request; False when the peer has closed or sends what is none."""
    view, filled, needed = memoryview(room), 0, 1
    while filled < needed:
        count = line.recv_into(view[filled:])
        if not count:
            return False
        if not filled:  # the head of a request of this client comes whole
            ends, found = room.find(b"\r\n\r\n", 0, count), _LENGTH.search(room, 0, count)
            if ends < 0 or found is None or ends + 4 + int(found[1]) > ROOM:
                return False
            needed = ends + 4 + int(found[1])
        filled += count
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True, help="size of the answer's body")
    options = parser.parse_args()
    serve(options.port, options.bytes)


if __name__ == "__main__":
    main()
