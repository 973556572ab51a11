"""ScaleFL: clients whose machines differ fine-tune one vision-language model together."""

__version__ = "0.1.0"
