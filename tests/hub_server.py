"""A server on the loopback interface that speaks as much of the Hub's file protocol as huggingface_hub 2.4 uses.

It serves generated repositories: the revision's description, the tree, and files (small ones at once; weights and
Parquet by redirect to a second host name, as the Hub does with its store). It can hang, or cut a body short. Not for
anything but tests: it keeps every file in memory.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STORED_APART = (".safetensors", ".parquet")
ROUTE = re.compile(
    r"/(?:api/)?(?P<kind>models/|datasets/)?(?P<id>[^/]+/[^/]+)/(?P<verb>revision|tree|resolve)/(?P<rest>.+)"
)


class HubServer:
    """`with HubServer(repos) as server:`, repos {(kind, id): {revision: {path: bytes}}}, kind "model" or "dataset".

    `mode`: "ok"; "hang": accepts and says nothing; "hang_head", "hang_body": describes the repository, then is silent
    at a file's HEAD, or after half of a body; "short": half a body under the full Content-Length; "lying": half a body,
    with a Content-Length to match; "other_commit": files of another commit. `requests` holds "METHOD path" of each.
    """

    def __init__(self, repos: dict, mode: str = "ok"):
        self.repos, self.mode, self.requests = repos, mode, []
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
        self.port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; from here on connections are refused."""
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


def answer(request: BaseHTTPRequestHandler, server: HubServer) -> None:
    path = request.path.partition("?")[0]
    server.requests.append(f"{request.command} {path}")
    if server.mode == "hang" or (server.mode == "hang_head" and request.command == "HEAD"):
        server.closing.wait()
        return
    if path.startswith("/store/"):
        send(request, server, blob(server, path.rpartition("/")[2]), {})
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
    elif route["verb"] == "resolve":
        send_file(request, server, revision, revisions[revision], name)
    else:
        send_json(request, describe(route, revision, revisions[revision]))


def describe(route: re.Match, revision: str, files: dict) -> object:
    if route["verb"] == "tree":
        return [{"type": "file", "path": p, "size": len(b), "oid": digest(b)} for p, b in files.items()]
    return {"id": route["id"], "sha": revision, "private": False, "siblings": [{"rfilename": path} for path in files]}


def send_file(request, server: HubServer, revision: str, files: dict, name: str) -> None:
    if name not in files:
        fail(request, "EntryNotFound")
        return
    commit = "f" * 40 if server.mode == "other_commit" else revision
    data = files[name]
    if not name.endswith(STORED_APART):
        send(request, server, data, {"X-Repo-Commit": commit, "ETag": f'"{digest(data)}"'})
        return
    request.send_response(302)
    request.send_header("Location", f"http://localhost:{server.port}/store/{digest(data)}")
    request.send_header("X-Repo-Commit", commit)
    request.send_header("X-Linked-Etag", f'"{digest(data)}"')
    request.send_header("X-Linked-Size", str(len(data)))
    request.send_header("Content-Length", "0")
    request.end_headers()


def send(request, server: HubServer, data: bytes, headers: dict) -> None:
    """The whole of `data`, or what the mode leaves of it; only the store (no headers of its own) cuts bodies short."""
    half = len(data) // 2
    cut = request.command == "GET" and not headers and server.mode in ("short", "lying", "hang_body")
    request.send_response(200)
    for key, value in headers.items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(half if cut and server.mode == "lying" else len(data)))
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(data[:half] if cut else data)
    if cut and server.mode == "hang_body":
        request.wfile.flush()
        server.closing.wait()


def send_json(request, content: object) -> None:
    body = json.dumps(content).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def fail(request, code: str) -> None:
    """As the Hub does it: 401 for a repository that is not there or private, 404 for the rest, the code in a header."""
    request.send_response(401 if code == "RepoNotFound" else 404)
    request.send_header("X-Error-Code", code)
    request.send_header("Content-Length", "0")
    request.end_headers()


def blob(server: HubServer, wanted: str) -> bytes:
    files = [data for revisions in server.repos.values() for held in revisions.values() for data in held.values()]
    return next(data for data in files if digest(data) == wanted)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
