"""A server on the loopback interface that speaks as much of the Hub's file protocol as huggingface_hub 2.4 uses.

It serves generated repositories: the revision's description, the tree, and files. It can also say nothing at all.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROUTE = re.compile(
    r"/(?:api/)?(?P<kind>models/|datasets/)?(?P<id>[^/]+/[^/]+)/(?P<verb>revision|tree|resolve)/(?P<rest>.+)"
)


class HubServer:
    """`with HubServer(repos) as server:`, repos {(kind, id): {revision: {path: bytes}}}, kind "model" or "dataset".

    `silent`: connections are accepted, and nothing is answered. `requests` holds "METHOD path" of each.
    """

    def __init__(self, repos: dict, silent: bool = False):
        self.repos, self.silent, self.requests = repos, silent, []
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                answer(self, server)

            do_GET = do_HEAD

            def log_message(self, *_args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        """Stop listening; from here on connections are refused."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


def answer(request: BaseHTTPRequestHandler, server: HubServer) -> None:
    path = request.path.partition("?")[0]
    server.requests.append(f"{request.command} {path}")
    if server.silent:
        server.closing.wait()
        return
    route = ROUTE.fullmatch(path)
    kind = "dataset" if route and route["kind"] == "datasets/" else "model"
    revisions = server.repos.get((kind, route["id"])) if route else None
    if revisions is None:
        fail(request, "RepoNotFound")
        return
    revision, _, name = route["rest"].partition("/")
    if revision not in revisions:
        fail(request, "RevisionNotFound")
    elif route["verb"] != "resolve":
        send(request, json.dumps(describe(route, revision, revisions[revision])).encode(), {})
    elif name not in revisions[revision]:
        fail(request, "EntryNotFound")
    else:
        data = revisions[revision][name]
        send(request, data, {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})


def describe(route: re.Match, revision: str, files: dict) -> object:
    if route["verb"] == "tree":
        digests = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
        return [{"type": "file", "path": p, "size": len(data), "oid": digests[p]} for p, data in files.items()]
    return {"id": route["id"], "sha": revision, "private": False, "siblings": [{"rfilename": path} for path in files]}


def send(request: BaseHTTPRequestHandler, data: bytes, headers: dict) -> None:
    request.send_response(200)
    for key, value in {"Content-Length": str(len(data)), **headers}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(data)


def fail(request: BaseHTTPRequestHandler, code: str) -> None:
    """As the Hub does it: 401 for a repository that is not there or private, 404 for the rest, the code in a header."""
    request.send_response(401 if code == "RepoNotFound" else 404)
    request.send_header("X-Error-Code", code)
    request.send_header("Content-Length", "0")
    request.end_headers()
