"""An http server of a directory, on 127.0.0.1, that does to its answers whatever a network may do."""

import contextlib
import socket
import struct
import threading
import time
from collections import defaultdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class ShardServer:
    """`faults[name]`: what happens to the next requests of a file, one after the other; a last "always" keeps the one
    before it. `requests`: the names asked for, in order."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[str] = []
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, name: str) -> str:
        left = self.faults[name]
        if not left:
            return ""
        return left[0] if left[1:] == ["always"] else left.pop(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: ShardServer, *arguments):
        self.owner = owner
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = unquote(self.path).lstrip("/")
        self.owner.requests.append(name)
        kind, _, argument = self.owner.fault(name).partition(" ")
        path = self.owner.directory / name
        body = path.read_bytes() if path.is_file() else None
        self.close_connection = True
        with contextlib.suppress(OSError):
            if kind == "mute":
                self.owner.closing.wait()
            elif kind == "noise":
                self.wfile.write(b"\0\xff" * 500)
            elif kind == "redirect":
                self.answer(302, b"", Location=argument)
            elif kind == "status" or body is None:
                self.answer(int(argument or 404), b"x" * 10_000)
            else:
                getattr(self, kind or "whole")(body)

    def answer(self, status: int, body: bytes, length: int | None = None, **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def whole(self, body):
        self.answer(200, body)

    def kept(self, body):
        """The connection stays open after the body."""
        self.answer(200, body)
        self.owner.closing.wait()

    def slow(self, body):
        """A second's pause in the middle."""
        self.answer(200, body[:1000], len(body))
        time.sleep(1)
        self.wfile.write(body[1000:])

    def stall(self, body):
        self.answer(200, body[: len(body) // 2], len(body))
        self.owner.closing.wait()

    def drip(self, body):
        self.answer(200, b"", len(body))
        for byte in body:
            self.wfile.write(bytes([byte]))
            time.sleep(0.01)

    def drip_headers(self, body):
        while not self.owner.closing.wait(0.01):
            self.wfile.write(b"H")

    def cut(self, body):
        self.answer(200, body[:-1], len(body))

    def reset(self, body):
        self.answer(200, body[: len(body) // 2], len(body))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def altered(self, body):
        at = len(body) // 2
        self.answer(200, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])

    def longer(self, body):
        self.answer(200, body + b"\0")

    def gzip(self, body):
        import gzip

        self.answer(200, gzip.compress(body), **{"Content-Encoding": "gzip"})

    def unsized(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def unsized_cut(self, body):
        self.unsized(body[:-100])

    def chunked(self, body, end: bytes = b"0\r\n\r\n"):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for at in range(0, len(body), 1000):
            piece = body[at : at + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(end)

    def chunked_cut(self, body):
        self.chunked(body[:-100], end=b"")

    def endless(self, body):
        self.send_response(200)
        self.end_headers()
        while not self.owner.closing.is_set():
            self.wfile.write(b"[" * 65536)
