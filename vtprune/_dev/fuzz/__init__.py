"""Damaged media and texts, read as any command reads them."""
