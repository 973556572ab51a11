"""Answers about images from a model folder."""
