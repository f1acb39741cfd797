"""Training, evaluating and tuning a freeze predictor. Not part of the installed library."""
