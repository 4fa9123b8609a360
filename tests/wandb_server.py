"""A W&B server on this machine that starts runs and keeps what is uploaded, and the service of a client."""

import gzip
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from runs import Run

KEY = "0123456789" * 4


class StandIn:
    """Listens on a free port at once. `behaviour`: "works", "silent" (accepts, never answers) or "fails" (500).

    `runs`: by W&B id, the lines of each uploaded file ("wandb-history.jsonl" and others). `alerts`: titles.
    `artifacts`: the files' contents by "NAME OF THE ARTIFACT/NAME OF THE FILE". `views`: what workspaces and reports
    show, by their kind."""

    def __init__(self, behaviour: str = "works"):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.behaviour, self._http.released = behaviour, threading.Event()
        self.runs = self._http.runs = {}
        self.alerts = self._http.alerts = []
        self.artifacts = self._http.artifacts = {}
        self.views = self._http.views = {}
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._http.server_port}", "WANDB_API_KEY": KEY}

    def history(self, run_id: str) -> list[dict]:
        """The rows that were uploaded, in the order in which the run has them."""
        return [json.loads(line) for line in self.runs[run_id].get("wandb-history.jsonl", [])]

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
        if asked[:2] == b"\x1f\x8b":
            asked = gzip.decompress(asked)
        if self.path == "/graphql":
            answer = {"data": self.query(json.loads(asked))}
        else:
            answer = self.stream(self.path.split("/"), asked)
        content = json.dumps(answer).encode()
        self.send_response(500 if self.server.behaviour == "fails" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def query(self, asked: dict) -> dict:
        operation, values, runs = asked.get("operationName"), asked.get("variables", {}), self.server.runs
        project = {"id": "p", "name": "ebm", "entity": {"id": "e", "name": "user"}}
        if operation == "UpsertBucket":
            new = values["name"] not in runs
            rows = runs.setdefault(values["name"], {}).get("wandb-history.jsonl", [])
            bucket = {"id": "b", "name": values["name"], "displayName": "n", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": len(rows)}, "inserted": new}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"http://{self.headers['Host']}/put"} for name in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if {"upsertView", "viewer", "GetProjects", "internalId"} & set(re.findall(r"\w+", asked.get("query", ""))):
            return self.view(asked["query"], values, project)
        if operation == "NotifyScriptableRunAlert":
            self.server.alerts.append(values["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        if "Artifact" in (operation or ""):
            return self.artifact(operation, values)
        known = operation == "RunResumeStatus" and values["name"] in runs
        return {"model": {**project, "bucket": self.resumed(values["name"]) if known else None}}

    def view(self, query: str, values: dict, project: dict) -> dict:
        """What is asked on the way to a saved workspace or report, and these."""
        if "upsertView" in query:
            self.server.views[values["type"]] = json.loads(values["spec"])
            shown = {name: values.get(name) for name in ("name", "displayName", "type", "description", "spec")}
            shown |= {"id": "Vmlldzox", "project": {**project, "entityName": "user"}, "user": None}
            return {"upsertView": {"view": shown, "inserted": True}}
        page = {"hasNextPage": False, "endCursor": None}
        node = {**project, "internalId": "p", "entityName": "user", "createdAt": "", "isBenchmark": False, "user": None}
        viewer = {"id": "u", "username": "user", "entity": "user", "flags": "{}", "admin": False}
        models = {"edges": [{"node": node, "cursor": "c"}], "pageInfo": page}
        return {"viewer": viewer | {"teams": {"edges": []}}, "models": models, "project": node}

    def resumed(self, name: str) -> dict:
        """What a client asks of a run that is there already."""
        files = self.server.runs[name]
        history, events = (files.get(f"wandb-{kind}.jsonl", []) for kind in ("history", "events"))
        return {
            "id": "b", "name": name, "displayName": "n", "summaryMetrics": "{}", "config": "{}", "tags": [],
            "notes": "", "wandbConfig": '{"t": 1}', "logLineCount": 0, "historyLineCount": len(history),
            "eventsLineCount": len(events), "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
        }  # fmt: skip

    def artifact(self, operation: str, values: dict) -> dict:
        """An artifact is made, gets its files and a manifest, and is committed. Its id is the name it has here."""
        url = f"http://{self.headers['Host']}/put"
        if operation == "CreateArtifact":
            made = {"id": values["input"]["artifactCollectionName"], "state": "PENDING"}
            return {"createArtifact": {"artifact": made | {"artifactSequence": {"latestArtifact": None}}}}
        if operation == "CreateArtifactManifest":
            file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if operation == "CreateArtifactFiles":
            nodes = [
                {"storagePath": "s", "uploadUrl": f"{url}/artifact/{file['artifactID']}/{file['name']}",
                 "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]}}
                for file in values["input"]["artifactFiles"]
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        assert operation == "CommitArtifact", operation
        return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": "d"}}}

    def stream(self, path: list[str], content: bytes) -> dict:
        """/files/ENTITY/PROJECT/ID/file_stream: lines from an offset on. /put/artifact/ID/NAME: a file of an artifact.
        Other uploads are not kept."""
        if path[-1] == "file_stream":
            for name, part in json.loads(content).get("files", {}).items():
                lines = self.server.runs[path[4]].setdefault(name, [])
                lines[part["offset"] :] = part["content"]
        if "artifact" in path:
            self.server.artifacts["/".join(path[3:])] = content
        return {}

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
