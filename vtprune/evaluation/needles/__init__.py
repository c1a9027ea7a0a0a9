"""Small changes planted in one's own media: which of their tokens, and which answers, survive."""
