"""The socket and the HTTP server under the inference server: uvicorn with httptools and uvloop (docs/adr/0003)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterable
from types import FrameType

import uvicorn

from device_agents.connection import BoundedConnection
from device_agents.errors import BadConfiguration
from device_agents.server import InferenceServer

BACKLOG = 1024


class QuietServer(uvicorn.Server):
    """uvicorn without its tick every 0.1 s: an idle device stays idle. Stops on ``stop()`` or a signal."""

    def __init__(self, app: InferenceServer, *, sockets: Iterable[socket.socket]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedConnection,
                loop="uvloop",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                date_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=10,
                backlog=BACKLOG,
            )
        )
        self._sockets = list(sockets)
        for ready in self._sockets:
            ready.listen(BACKLOG)  # from here on early clients wait a moment instead of being refused
        self._stop = asyncio.Event()
        self._running_loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Sleeps until the end."""
        self._running_loop = asyncio.get_running_loop()
        if not self.should_exit:
            await self._stop.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        super().handle_exit(sig, frame)
        self._wake()

    def stop(self) -> None:
        """Ends ``serve_until_stopped``, from any thread."""
        self.should_exit = True
        self._wake()

    def serve_until_stopped(self) -> None:
        """Serves in the calling thread. Signals end it cleanly instead of killing the process on the way out."""
        with contextlib.suppress(ValueError):  # not the main thread: there are no signals to care for
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
        self.run(sockets=self._sockets)

    def _wake(self) -> None:
        if self._running_loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._running_loop.call_soon_threadsafe(self._stop.set)


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address; raises BadConfiguration when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise BadConfiguration(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    return listener
