"""The architectures that are trained on the world: one module each."""
