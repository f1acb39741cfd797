"""Making and judging a freeze predictor. Not part of the installed library."""
