"""What the library itself costs, against the limit."""
