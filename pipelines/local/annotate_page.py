"""The page of `kfp-rlhf annotate --page`: a server on this machine that shows pairs and appends each answer to a file."""

import datetime
import json
import os
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from components.rlhf.text.errors import InputError
from components.rlhf.text.strict_json import NotJsonError, parse_json
from pipelines.local.annotate import Pair
from pipelines.local.annotate_answers import ANSWERS, read_answers

FILE = "answers.jsonl"
MAX_BODY, MAX_NAME = 4096, 100


class AnswerFile:
    """answers.jsonl: a line for each answer, on disk before it is acknowledged; the last answer of a rater to a pair counts."""

    def __init__(self, path: Path, pairs: Sequence[Pair]) -> None:
        self.path, self._known, self._lock = path, {pair.pair for pair in pairs}, threading.Lock()
        self._latest: dict[tuple[str, str], str] = {}
        if path.is_file():
            _cut_torn_line(path)
            for location, given in read_answers(path):
                if given.pair not in self._known:
                    raise InputError(f"{location} answers another pair; pass a new folder with --out.")
                self._latest[given.rater, given.pair] = given.answer

    def of(self, rater: str) -> dict[str, str]:
        with self._lock:
            return {pair: answer for (name, pair), answer in self._latest.items() if name == rater}

    def add(self, row: Any) -> str:
        """Append an answer; return what is wrong with it, or nothing."""
        if not isinstance(row, dict) or row.keys() != {"pair", "rater", "answer"}:
            return "an answer has the fields pair, rater and answer"
        if not all(isinstance(value, str) for value in row.values()):
            return "pair, rater and answer are texts"
        pair, rater, answer = row["pair"], row["rater"], row["answer"]
        if pair not in self._known or answer not in ANSWERS:
            return "unknown pair or answer"
        if not 0 < len(rater.strip()) <= MAX_NAME or not rater.isprintable():
            return f"a name has 1 to {MAX_NAME} characters"
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"pair": pair, "rater": rater.strip(), "answer": answer, "time": time}, ensure_ascii=False)
        with self._lock:
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._latest[rater.strip(), pair] = answer
        return ""


def _cut_torn_line(path: Path) -> None:
    """Remove a last line without its end, which was never acknowledged."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def page_of(pairs: Sequence[Pair]) -> str:
    """The page, with what raters may see of the pairs: neither models nor scores."""
    shown = [{"pair": p.pair, "prompt": p.messages, "a": p.a, "b": p.b} for p in pairs]
    data = json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c")  # text may contain </script>
    return Path(__file__).with_name("annotate.html").read_text(encoding="utf-8").replace("/*PAIRS*/[]", data)


def make_server(pairs: Sequence[Pair], answers: AnswerFile, port: int) -> ThreadingHTTPServer:
    """The server on 127.0.0.1; port 0 takes a free one. Only a page of its own can post: no other site and no other host name."""
    page = page_of(pairs).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if not self._is_own():
                self._send(403, b"open the page at 127.0.0.1", "text/plain")
            elif url.path == "/":
                self._send(200, page, "text/html; charset=utf-8")
            elif url.path == "/answers":
                rater = parse_qs(url.query).get("rater", [""])[0].strip()
                self._send(200, json.dumps(answers.of(rater)).encode(), "application/json")
            else:
                self._send(404, b"not found", "text/plain")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not self._is_own() or self.headers.get("Content-Type") != "application/json":
                self._send(403, b"only this page can answer", "text/plain")
            elif not length.isdecimal() or int(length) > MAX_BODY:
                self._send(413, b"an answer is short", "text/plain")
            else:
                try:
                    problem = answers.add(parse_json(self.rfile.read(int(length))))
                except NotJsonError as error:
                    problem = str(error)
                except OSError as error:  # a full disk
                    self._send(500, str(error.strerror).encode(), "text/plain")
                    return
                self._send(400 if problem else 200, (problem or "saved").encode(), "text/plain")

        def _is_own(self) -> bool:
            own = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}  # type: ignore[attr-defined]
            origin = self.headers.get("Origin")
            return self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own)

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server
