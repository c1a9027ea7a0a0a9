"""Sampled captions, unpruned beside pruned: how right they are, and how different."""
