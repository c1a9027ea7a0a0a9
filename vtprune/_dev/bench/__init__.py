"""The project's own speed figures, each made by one command."""
