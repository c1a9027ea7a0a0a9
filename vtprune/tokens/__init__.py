"""Where visual tokens sit, and how many of them stay: arithmetic, no model."""
