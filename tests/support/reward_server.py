"""A small HTTP server that answers JSON with JSON, and fails in the ways that reward servers fail."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from components.rlhf.data.records import Completion, Prompt
from tests.support.judge_server import Reply

Answer = Callable[[dict[str, Any]], Any]


class RewardServer:
    """answer(body) gives the JSON of the answer, or a Reply. Requests are recorded in their order, with their headers."""

    def __init__(self, answer: Answer, *, token: str | None = None) -> None:
        self.answer, self.token = answer, token
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
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
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/get_reward"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "RewardServer":
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
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
        try:
            if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
                reply = Reply(status=401, body=b'{"error": "who are you?"}')
            else:
                answer = self.answer(body)
                reply = answer if isinstance(answer, Reply) else Reply(body=json.dumps(answer).encode())
            send(handler, reply)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client did not wait
        finally:
            with self._lock:
                self._now -= 1


def send(handler: BaseHTTPRequestHandler, reply: Reply) -> None:
    time.sleep(reply.seconds)
    data = reply.body or b""
    handler.send_response(reply.status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    for name, value in reply.headers:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def chat(content: str, **message: Any) -> dict[str, Any]:
    """A chat completion in the format of OpenAI."""
    finish_reason = message.pop("finish_reason", "stop")
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish_reason,
    }
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


class Logs(list[str]):
    """A log that is a list of its lines."""

    def __call__(self, line: str) -> None:
        self.append(line)


def completions(*responses: str, ids: list[int] | None = None, **columns: str | list[str]) -> list[Completion]:
    """One completion for each response. A column is one text for all, or one for each."""
    return [
        Completion(
            prompt=Prompt(
                prompt=f"prompt {i} ",
                id=f"p{i}",
                columns={name: text if isinstance(text, str) else text[i] for name, text in columns.items()},
            ),
            prompt_ids=[1],
            response_ids=ids or [2],
            response=response,
            logprobs=None,
            truncated=False,
        )
        for i, response in enumerate(responses)
    ]
