"""What was measured or kept, drawn."""
