"""Where a model can be cut, measured on its own states and answers."""
