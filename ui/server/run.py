"""The app on a socket: its middleware, how connections are closed, and how the server stops."""

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import gradio as gr
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from studio.errors import StudioError
from studio.ui.api.routes import new_application
from studio.ui.server.keys import Keys
from studio.ui.server.logs import RequestLog
from studio.ui.server.middleware import GuardMiddleware
from studio.ui.server.session import Listeners, use_listeners
from studio.ui.server.storage import kept_clean
from studio.ui.server.tools import describe_files
from studio.ui.server.worker import drain, is_idle

UPLOAD_BYTES = 1 << 28  # by default
_SESSIONS = 256  # that Gradio keeps the fields of, about 0.3 MiB each
_IDLE = 10  # seconds between two looks at a connection; one that asked for nothing at both is closed
_LONGEST_START = 30  # seconds
_LONGEST_ANSWER = 3  # seconds in which those who wait get their result or error
_LONGEST_END = 5  # seconds in which abandoned work reaches its next step


class Connection(H11Protocol):
    """A connection that is closed when it is idle: before its first request, between requests, and within one."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._was_idle = False
        self._look = self.loop.call_later(_IDLE, self._close_if_idle)

    def connection_lost(self, error: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(error)

    def _close_if_idle(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._was_idle:
            self.transport.close()
            return
        self._was_idle = idle
        self._look = self.loop.call_later(_IDLE, self._close_if_idle)


@contextmanager
def running(
    blocks: gr.Blocks,
    host: str,
    port: int,
    *,
    upload_bytes: int = UPLOAD_BYTES,
    open_requests: float = float("inf"),
    folder: Path | None = None,
    keys: Keys | None = None,
    origins: Collection[str] = (),
    listening: socket.socket | None = None,
    **settings: Any,
) -> Iterator[str]:
    """Serve an app and the API from a thread.

    Args:
        blocks: of `studio.ui.app.build_app`.
        host, port: where to listen; port 0 takes any that is free.
        upload_bytes: of an upload, at most.
        open_requests: of one client at a time, at most.
        folder: where the files of sessions are, which is then kept small; `None` for no folder of this process.
        keys, origins: as of `GuardMiddleware`.
        listening: what listens there already, as of `open_socket`.
        settings: passed on to `gr.mount_gradio_app`.

    Yields:
        The address of the app.

    Raises:
        StudioError: nothing can listen there.
    """
    listeners = Listeners()
    listening = listening or open_socket(host, port)
    app = new_application(folder, lifespan=lambda _: kept_clean(folder, blocks, listeners) if folder else nullcontext())
    blocks.state_session_capacity, blocks.has_launched = _SESSIONS, True
    port = listening.getsockname()[1]
    gr.mount_gradio_app(
        app, blocks, "/", server_name=host, server_port=port, show_error=False, max_file_size=upload_bytes, **settings
    )
    describe_files(blocks.mcp_server_obj)
    guarded = GuardMiddleware(app, listeners, upload_bytes, open_requests, keys, origins)
    config = uvicorn.Config(
        RequestLog(guarded),
        log_level="warning",
        http=Connection,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    use_listeners(listeners)
    thread.start()
    try:
        _wait(lambda: server.started or not thread.is_alive(), _LONGEST_START)
        if not server.started:
            raise StudioError("The app does not start; the lines above say why.")
        yield address_of(host, port)
    finally:
        blocks.is_running = False
        blocks._queue.close()
        blocks.app.stop_event.set()  # ends the connections that a page keeps open
        server.should_exit = True
        thread.join(_LONGEST_END)
        use_listeners(None)


def run(blocks: gr.Blocks, host: str, port: int, *, drain_seconds: float = 0, **settings: Any) -> None:
    """Serve an app until SIGINT or SIGTERM; a second one ends the process at once.

    From then on no new work is taken. Work under way goes on for `drain_seconds`; clients that still wait then get an
    error that says so.

    Args:
        blocks, host, port: as of `running`.
        drain_seconds: how long work may still take, at least 0.
        settings: the other arguments of `running`.

    Raises:
        StudioError: nothing can listen there.
    """
    with until_stopped() as wait:
        with running(blocks, host, port, **settings) as address:
            announce(f"The app is at {address}")
            wait()
            announce(f"Stopping: work under way has {drain_seconds:g} seconds. Press Ctrl+C to stop at once.")
            drained = drain(drain_seconds)
            _wait(lambda: not blocks._queue.event_ids_to_events, _LONGEST_ANSWER)
        announce("Stopped." if drained else "Stopped; work that took longer was refused.")
    if not _wait(is_idle, _LONGEST_END):
        shutil.rmtree(settings.get("folder") or "", ignore_errors=True)
        os._exit(0)  # or the process would wait for work that does not stop


@contextmanager
def until_stopped() -> Iterator[Callable[[], None]]:
    """While this is entered, SIGINT and SIGTERM stop nothing by themselves, and a second one ends the process at once.

    Yields:
        A function that waits for the first of them.
    """
    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        if stopped:
            os._exit(128 + number)
        stopped.append(number)

    def wait() -> None:
        while not stopped:
            time.sleep(0.1)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wait
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def announce(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any that is free.

    Raises:
        StudioError: nothing can listen there.
    """
    host = host.removeprefix("[").removesuffix("]")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise StudioError(f"The app cannot listen on {host}:{port}: choose another with --host or --port.") from error


def address_of(host: str, port: int) -> str:
    """The address of a server on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host).removeprefix("[").removesuffix("]")
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _wait(is_done: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is done, so many seconds at most; return whether it is."""
    ends = time.monotonic() + seconds
    while not (done := is_done()) and time.monotonic() < ends:
        time.sleep(0.02)
    return done
