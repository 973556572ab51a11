"""From released weights to a model folder of this project."""
