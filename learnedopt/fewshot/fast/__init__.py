"""What is there for speed alone: without it the numbers would be the same up to rounding."""
