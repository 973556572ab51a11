"""The page itself; the only importer of gradio."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio
from fastapi import FastAPI

from scalefl.prediction.asked import Asked
from scalefl.serving.guard import Guard
from scalefl.serving.upload import told

STATEMENT = "This is a research tool and no medical device: do not use it to diagnose or to treat."
CSS = "figure { display: inline-block; width: 48%; margin: 0 1% 0 0 } figure img { width: 100% }"


MB = 2**20
FORM = 2**16
"""Bytes that a request for an upload has beside the file, at most."""
CLEARED_EVERY, KEPT = 60, 600
"""Seconds: of uploads that nobody asked about, as of a page that was closed."""
WAITING = 32
"""Questions in the queue; further ones are refused."""


def app(asked: Asked, uploads: Path, max_upload_mb: int) -> Guard:
    """The page at `/`, whose files go through the folder `uploads`, which gradio must know as its own.

    It loads nothing from elsewhere, reports nothing, and the browser keeps no history. One question is
    answered at a time.
    """
    blocks = gradio.Blocks(title="ScaleFL", analytics_enabled=False, delete_cache=(CLEARED_EVERY, KEPT))
    with blocks:
        gradio.HTML(f'<h1>ScaleFL</h1><p id="statement"><b>{STATEMENT}</b></p>')
        gradio.HTML(f"<p>Question: {escape(asked.model.question)}</p>")
        file = gradio.File(label=f"Radiograph, up to {max_upload_mb} MB")
        shown = gradio.HTML()
        # The field is emptied: the file is gone, and the next one can be dropped.
        file.upload(
            lambda path: (None, told(asked, Path(path))), file, [file, shown], api_visibility="private"
        )
    blocks.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    blocks.has_launched = True  # for what is mounted too gradio then looks where a file lies
    page = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="/",
        theme=gradio.themes.Base(font=["sans-serif"], font_mono=["monospace"]),
        css=CSS,
        max_file_size=f"{max_upload_mb}mb",
        run_history=False,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    return Guard(page, uploads, max_upload_mb * MB + FORM)
