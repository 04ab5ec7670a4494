"""A tiny Open Inference v2 server in this process: answers are right, or as told."""

from __future__ import annotations

import json
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

from demo.inference import HEADER_LENGTH

CLASSES = 10


@dataclass
class FakeDevice:
    """Serves `digits` on a free port. The class of an image is its first pixel; change the fields while it runs."""

    decision_id: str | None = "decision-1"
    delay_s: float = 0.0
    status: int = 200
    speaks_binary: bool = True
    seen: int = 0
    _server: ThreadingHTTPServer = field(init=False, repr=False)

    def __enter__(self) -> Self:
        device = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Without it the kernel holds the small answer back for 40 ms.
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                device.reply(self, 200, b"{}", {})

            def do_POST(self) -> None:
                device.infer(self, self.rfile.read(int(self.headers["Content-Length"])))

            def log_request(self, *_: object) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def infer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        self.seen += 1
        time.sleep(self.delay_s)
        if self.status != 200:
            self.reply(handler, self.status, b'{"error": "told to"}', {})
            return
        first_pixel = body[int(handler.headers[HEADER_LENGTH])]
        logits = [float(index == first_pixel) for index in range(CLASSES)]
        output: dict[str, object] = {"name": "logits", "shape": [1, CLASSES], "datatype": "FP32"}
        binary = struct.pack(f"<{CLASSES}f", *logits) if self.speaks_binary else b""
        output |= {"parameters": {"binary_data_size": len(binary)}} if binary else {"data": logits}
        header = json.dumps({"model_name": "digits", "outputs": [output]}).encode()
        extra = {HEADER_LENGTH: str(len(header))} if binary else {}
        self.reply(
            handler, 200, header + binary, extra | ({"X-Decision-Id": self.decision_id} if self.decision_id else {})
        )

    def reply(self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)
