"""Published tables, run on a model: their figures beside one's own."""
