"""ScaleFL: clients whose machines differ fine-tune one vision-language model together."""

import os

__version__ = "0.1.0"

STARTED_BY = os.getppid()
"""Read before torch is imported, which takes seconds: a launcher may be gone by then."""
