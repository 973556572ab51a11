"""Heads and channels in the order of what they contribute."""
