"""A real S3-speaking server (moto) behind a gateway that counts requests and can break them."""

from __future__ import annotations

import http.client
import http.server
import logging
import threading
import urllib.request
from collections.abc import Callable
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}

Fault = Callable[[str, str], int | None]
"""Method and path -> status to answer with instead of the server's, or None."""


class Gateway(http.server.ThreadingHTTPServer):
    """Passes requests on to a server.

    Attributes:
        requests: Method and path of every request so far.
        fault: Asked before a request is passed on.
    """

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda _method, _path: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        self.server.requests.append((self.command, self.path))
        body = self._body()
        status = self.server.fault(self.command, self.path)
        if status is not None:
            self._answer(status, [], b"")
            return
        left_out = {"expect", "transfer-encoding", "content-length", "connection"}
        headers = {k: v for k, v in self.headers.items() if k.lower() not in left_out}
        connection = http.client.HTTPConnection(self.server.target)
        connection.request(self.command, self.path, body=body, headers=headers)
        response = connection.getresponse()
        content = response.read()
        kept = [(k, v) for k, v in response.getheaders() if k.lower() not in left_out]
        size = response.getheader("Content-Length") if self.command == "HEAD" else None
        connection.close()
        self._answer(response.status, kept, content, size)

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            size = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(size) if size else None
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, size: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", size or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on


class ObjectStore:
    """The server with one bucket.

    Attributes:
        gateway: What clients talk to.
        url: Its address.
        client: boto3's, straight to the server.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self._address = f"{host}:{port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://{self._address}",
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        self.client.create_bucket(Bucket=BUCKET)
        self.gateway = Gateway(self._address)
        self.url = self.gateway.url
        threading.Thread(target=self.gateway.serve_forever, daemon=True).start()

    def uri(self, path: str, bucket: str = BUCKET) -> str:
        """URI that names this server."""
        return f"s3://{bucket}/{path}?endpoint_override={self.url}"

    def keys(self, prefix: str) -> list[str]:
        """Names of the objects below a prefix, without it, markers of folders left out."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key.removeprefix(prefix) for key in keys if not key.endswith("/")]

    def content(self, key: str) -> bytes:
        """An object's bytes."""
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def count(self, method: str, part: str) -> int:
        """Requests so far by method and a part of their path."""
        return sum(m == method and part in path for m, path in self.gateway.requests)

    def check_keys(self, after: float) -> None:
        """Let the server check access keys, which it has none of, after so many requests."""
        data = str(after).encode()
        url = f"http://{self._address}/moto-api/reset-auth"
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(url, data=data, headers=headers, method="POST")
        urllib.request.urlopen(request).close()

    def stop(self) -> None:
        """End both servers."""
        self.gateway.shutdown()
        self.gateway.server_close()
        self._server.stop()
