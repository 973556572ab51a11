"""Options of `scalefl serve`."""

from collections.abc import Iterator
from dataclasses import dataclass

from scalefl.config.askoptions import AskOptions


@dataclass(frozen=True, kw_only=True)
class ServeOptions(AskOptions):
    """Show a web page that asks a model about a radiograph: a research tool, no medical device. Who reaches
    the page may use it; nobody logs in, and nothing is encrypted.
    """

    host: str = "127.0.0.1"
    """Address to listen on; of another one, other machines reach the page."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    max_upload_mb: int = 64
    """Largest file to take, in MB."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not 0 <= self.port <= 65535:
            yield f"--port: got {self.port}; expected a number from 0 to 65535."
        yield from self.below_one("max_upload_mb")
