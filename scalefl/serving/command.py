"""`scalefl serve`: a page on this machine, until it is stopped."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from scalefl.config.serveoptions import ServeOptions
from scalefl.console import Display
from scalefl.contracts import InputError, Interrupted
from scalefl.prediction.asked import load

GOODBYE_SECONDS = 2
"""That open connections are waited for; a browser holds one as long as it shows the page."""


def serve(options: ServeOptions) -> None:
    """Answer until a signal; then raises Interrupted, or of Ctrl-C KeyboardInterrupt.

    Raises InputError if gradio is missing, or the address cannot be listened on.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("scalefl serve: gradio is not installed; `pip install .[serve]` installs it.")
    with (
        _stopped_by_a_signal(),
        _listening(options.host, options.port) as sock,
        _folder_of_uploads() as uploads,
    ):
        asked = load(options)
        # Imported late: gradio reads at import where uploads are to lie, and is not there for other commands.
        import uvicorn

        from scalefl.serving.page import app

        config = uvicorn.Config(
            app(asked, uploads, options.max_upload_mb),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=GOODBYE_SECONDS,
        )
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"http://{host}:{sock.getsockname()[1]}"
        Display(speaks=True, print_freq=1).line(f"page         {address} (Ctrl-C ends it)")
        uvicorn.Server(config).run(sockets=[sock])


@contextmanager
def _stopped_by_a_signal() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: uvicorn shuts down first, then raises the signal once more.

    A shell that starts it in the background has it ignore Ctrl-C, which uvicorn does not.
    """

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(signum)

    handlers = {signal.SIGTERM: stop, signal.SIGINT: signal.default_int_handler}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python repeats the address
        raise InputError(
            f"--host {host} --port {port}: {reason}; expected an address of this machine and a free "
            "port; give another --port, or 0 for any."
        ) from error


@contextmanager
def _folder_of_uploads() -> Iterator[Path]:
    """Where gradio puts files until they are read: a folder that goes with the command."""
    with tempfile.TemporaryDirectory(prefix="scalefl-serve-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield Path(folder)
