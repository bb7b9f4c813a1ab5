"""A stand-in of the Hugging Face Hub on loopback: models with files, and what can go wrong with them."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """Serves `{repository: {file: bytes}}` from a thread; `url` is for `HF_ENDPOINT`.

    Attributes:
        gated: repositories that ask for an agreement.
        failing: files that the server has no answer for.
        breaks: how many downloads end after half of the bytes.
        served: bytes of whole bodies, by file.
        ranges: where downloads were asked to begin.
    """

    def __init__(self, repositories):
        self.repositories, self.gated, self.failing = repositories, set(), set()
        self.breaks, self.served, self.ranges = 0, {}, []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                path = unquote(self.path.split("?")[0]).strip("/")
                if path.startswith("api/models/"):
                    return self.describe(path.removeprefix("api/models/"), body)
                repository, _, rest = path.partition("/resolve/")
                file = rest.partition("/")[2]
                if repository in stand_in.gated:
                    return self.refuse(401, "GatedRepo")
                content = stand_in.repositories.get(repository, {}).get(file)
                if content is None:
                    return self.refuse(404, "EntryNotFound")
                if file in stand_in.failing:
                    return self.refuse(500, "Failing")
                return self.send_file(file, content, body)

            def describe(self, path, body):
                repository = "/".join(path.split("/")[:2])
                if repository in stand_in.gated:
                    return self.refuse(401, "GatedRepo")
                files = stand_in.repositories.get(repository)
                if files is None:
                    return self.refuse(404, "RepoNotFound")
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                about = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
                return self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, body)

            def send_file(self, file, content, body):
                headers = {
                    "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
                    "Accept-Ranges": "bytes",
                }  # fmt: skip
                start, status = 0, 200
                if body and (asked := self.headers.get("Range", "")).startswith("bytes="):
                    start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
                    stand_in.ranges.append(start)
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                part = content[start:]
                if body and stand_in.breaks > 0 and len(part) > 1000:
                    stand_in.breaks -= 1
                    self.send_response(status)
                    for name, value in {**headers, "Content-Length": str(len(part))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(part[: len(part) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    return self.connection.close()
                if body:
                    stand_in.served[file] = stand_in.served.get(file, 0) + len(part)
                return self.send(status, part, headers, body)

            def refuse(self, status, code):
                self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, self.command == "GET")

            def send(self, status, content, headers, body):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
