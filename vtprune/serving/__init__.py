"""Many files, and other harnesses and clients."""
