"""What was measured or kept, drawn."""

FORMATS = (".png", ".html", ".json")
"""Suffixes of the files that a drawing of kept tokens can be saved as."""
