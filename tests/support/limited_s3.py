"""An S3 server in memory that lacks what some stores lack. It stands in for them; the real server of the tests is SeaweedFS."""

import threading
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

CHECKSUM_HEADERS = ("x-amz-checksum-", "x-amz-sdk-checksum-algorithm", "x-amz-trailer")


@dataclass
class LimitedS3:
    """checksums: the error code with which they are rejected, or "accept". conditional_writes: how If-None-Match is treated."""

    checksums: str = "accept"
    conditional_writes: Literal["honour", "ignore", "reject"] = "honour"
    delete_objects: bool = True
    list_uploads: bool = True
    forgets_writes: bool = False
    objects: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)  # key -> content, metadata headers
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> "LimitedS3":
        limited = self

        class Handler(_Handler):
            store = limited

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: LimitedS3
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _read(self) -> tuple[str, dict[str, list[str]], bytes]:
        parts = urlsplit(self.path)
        key = unquote(parts.path).lstrip("/").partition("/")[2]
        query = parse_qs(parts.query, keep_blank_values=True)
        self.store.requests.append(f"{self.command} {'?'.join([key, *sorted(query)])}")
        return key, query, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>no {code}</Message></Error>".encode())

    def _object(self, key: str) -> None:
        if key not in self.store.objects:
            self._refuse(404, "NoSuchKey")
            return
        data, metadata = self.store.objects[key]
        status, headers = 200, {"ETag": f'"{md5(data).hexdigest()}"', "Last_Modified": formatdate(usegmt=True)}
        if span := self.headers.get("Range"):
            start, _, stop = span.removeprefix("bytes=").partition("-")
            data, status = data[int(start) : int(stop) + 1], 206
        self._answer(status, data, Content_Length=str(len(data)), **headers, **metadata)

    def do_HEAD(self) -> None:
        key, _, _ = self._read()
        self._object(key) if key else self._answer(200)

    def do_GET(self) -> None:
        key, query, _ = self._read()
        if "uploads" in query:
            if not self.store.list_uploads:
                self._refuse(501, "NotImplemented")
                return
            self._answer(200, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
        elif "list-type" in query:
            (prefix,) = query.get("prefix", [""])
            entries = "".join(
                f"<Contents><Key>{key}</Key><Size>{len(data)}</Size></Contents>"
                for key, (data, _) in sorted(self.store.objects.items())
                if key.startswith(prefix)
            )
            body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
            self._answer(200, body.encode())
        else:
            self._object(key)

    def do_PUT(self) -> None:
        key, _, data = self._read()
        names = [name.lower() for name in self.headers]
        if self.store.checksums != "accept" and any(name.startswith(CHECKSUM_HEADERS) for name in names):
            self._refuse(501 if self.store.checksums == "NotImplemented" else 403, self.store.checksums)
        elif "if-none-match" in names and self.store.conditional_writes == "reject":
            self._refuse(501, "NotImplemented")
        elif "if-none-match" in names and self.store.conditional_writes == "honour" and key in self.store.objects:
            self._refuse(412, "PreconditionFailed")
        else:
            metadata = {n: v for n, v in self.headers.items() if n.lower().startswith("x-amz-meta-")}
            self.store.objects[key] = (b"" if self.store.forgets_writes else data, metadata)
            self._answer(200, ETag=f'"{md5(data).hexdigest()}"')

    def do_POST(self) -> None:
        _, query, body = self._read()
        if "delete" not in query or not self.store.delete_objects:
            self._refuse(501, "NotImplemented")
            return
        for name in ElementTree.fromstring(body).iter("{http://s3.amazonaws.com/doc/2006-03-01/}Key"):
            self.store.objects.pop(str(name.text), None)
        self._answer(200, b"<DeleteResult></DeleteResult>")

    def do_DELETE(self) -> None:
        key, _, _ = self._read()
        self.store.objects.pop(key, None)
        self._answer(204)
