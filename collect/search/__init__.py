"""The folds of a search for settings as jobs: `python -m predictor tune` with several slots, or on a cluster."""
