"""What pruning would save on this machine, from a model's shape alone."""
