"""A small OpenAI-compatible server whose preferences are known, and which fails in the ways that endpoints fail."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

QUESTION = re.compile(
    r"\[Prompt\]\n(?P<prompt>.*)\n\n\[Response A\]\n(?P<a>.*)\n\[End of response A\]\n\n"
    r"\[Response B\]\n(?P<b>.*)\n\[End of response B\]",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer that is no verdict: another status, another body, another message, or a late one."""

    status: int = 200
    body: bytes | None = None  # instead of a chat completion
    message: dict[str, Any] | None = None  # of the chat completion
    finish_reason: str = "stop"
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0  # until it is sent


def refusal(status: int, message: str, **headers: str) -> Reply:
    """An error in the format of OpenAI."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error"}}).encode()
    return Reply(status=status, body=body, headers=tuple(headers.items()))


Answer = Callable[[str, str, str], "str | Reply"]


class JudgeServer:
    """answer(prompt, a, b) gives the text of the answer, or a Reply. Requests are numbered, and recorded with their headers."""

    def __init__(self, answer: Answer, *, key: str | None = None) -> None:
        self.answer, self.key = answer, key
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_a_time = self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "JudgeServer":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
        try:
            self._send(handler, self._reply(handler, body))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait
        finally:
            with self._lock:
                self._now -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> "str | Reply":
        if handler.path != "/v1/chat/completions":
            return refusal(404, f"no {handler.path} here")
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return refusal(401, "Incorrect API key provided")
        question = QUESTION.search(body["messages"][-1]["content"])
        assert question, body
        return self.answer(question["prompt"], question["a"], question["b"])

    def _send(self, handler: BaseHTTPRequestHandler, answer: "str | Reply") -> None:
        reply = answer if isinstance(answer, Reply) else Reply(message={"role": "assistant", "content": answer})
        time.sleep(reply.seconds)
        message = reply.message or {"role": "assistant", "content": "[[A]]"}
        choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        completion = {"object": "chat.completion", "choices": [choice], "usage": usage}
        data = json.dumps(completion).encode() if reply.body is None else reply.body
        handler.send_response(reply.status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        for name, value in reply.headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


def prefers(better: Callable[[str], float]) -> Answer:
    """Prefers the response with the higher number, with a sentence before the verdict."""

    def answer(prompt: str, a: str, b: str) -> str:
        verdict = "C" if better(a) == better(b) else "A" if better(a) > better(b) else "B"
        return f"I compared both responses. [[{verdict}]]"

    return answer
