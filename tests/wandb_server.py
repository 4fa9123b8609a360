"""A W&B server on this machine that knows no more than how to start a run, and the service of a client."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from runs import Run

KEY = "0123456789" * 4


class StandIn:
    """Listens on a free port at once. `behaviour`: "works", "silent" (accepts, never answers) or "fails" (500)."""

    def __init__(self, behaviour: str = "works"):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.behaviour, self._http.released = behaviour, threading.Event()
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._http.server_port}", "WANDB_API_KEY": KEY}

    def close(self) -> None:
        self._http.released.set()
        self._http.shutdown()
        self._http.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.behaviour == "silent":
            self.server.released.wait()
            return
        project = {"id": "p", "name": "ebm", "entity": {"id": "e", "name": "user"}}
        data = {"model": {**project, "bucket": None}}
        if b"UpsertBucket" in asked:
            bucket = {"id": "b", "name": "n", "displayName": "n", "config": "{}", "project": project}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(500 if self.server.behaviour == "fails" else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *_):
        pass


def service(run: Run) -> int:
    """The process of the W&B client's service: it names the training process that it belongs to."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0") if entry.name.isdigit() else []
            if words[0].endswith("wandb-core") and os.getsid(int(words[words.index("--pid") + 1])) == run.process.pid:
                return int(entry.name)
        except (OSError, IndexError, ValueError):
            continue
    raise AssertionError("no wandb-core")
