"""The embedded model: its training and its results."""
