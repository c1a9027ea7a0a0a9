"""Many ways to prune compared: quality, speed, and the layers where a model can be cut."""
