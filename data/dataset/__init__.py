"""What a predictor is trained on: labelled windows, made of trajectories and outcomes."""
