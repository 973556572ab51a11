"""What of gradio's own routes stays open: those of the page, for files that were uploaded to it.

gradio takes a path, or an address to download, in place of an upload, and has ways around its queue.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

UPLOAD, ASK = "/gradio_api/upload", "/gradio_api/queue/join"
"""Routes that take what a browser sends."""
CLOSED = ("/gradio_api/file", "/gradio_api/proxy", "/gradio_api/stream")
"""Routes that give out files; the page's pictures are in its text."""
LARGEST_QUESTION = 64 * 1024
"""Bytes: what names an uploaded file takes less than one KiB."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any, uploads: Path, max_upload: int) -> None:
        """`uploads` is the folder of uploaded files, `max_upload` the most bytes of one request."""
        self._app, self._uploads, self._max_upload = app, uploads.resolve(), max_upload

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # the page has none
            await send({"type": "websocket.close"})
            return
        if scope["type"] == "http":
            refusal, receive = await self._refusal(scope, receive)
            if refusal is not None:
                await send({"type": "http.response.start", "status": refusal, "headers": []})
                await send({"type": "http.response.body"})
                return
        await self._app(scope, receive, send)

    async def _refusal(self, scope: Message, receive: Receive) -> tuple[int | None, Receive]:
        """The status of a request that goes no further, else None; and what is to be read in either case."""
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD"):
            return (403 if path.startswith(CLOSED) else None), receive
        if scope["method"] != "POST" or path not in (UPLOAD, ASK):
            return 403, receive
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411, receive
        if int(length) > (self._max_upload if path == UPLOAD else LARGEST_QUESTION):
            return 413, receive
        if path == UPLOAD:
            return None, receive
        body = await _body(receive)
        return (None if self._asks_about_an_upload(body) else 403), _once(body, receive)

    def _asks_about_an_upload(self, body: bytes) -> bool:
        try:
            (file,) = json.loads(body)["data"]
            path = Path(file["path"])
            is_there = path.is_absolute() and path.resolve().is_relative_to(self._uploads) and path.is_file()
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            return False
        return is_there and not file.get("is_stream")


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _once(body: bytes, receive: Receive) -> Receive:
    """Gives out the body, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message
