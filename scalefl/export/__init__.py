"""A level of a checkpoint as a model of its own."""
