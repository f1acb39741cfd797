"""The data: what networks train on, the trajectories of training runs, and the outcomes of freezing."""
