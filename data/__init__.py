"""What networks train on, and the trajectories that trainings leave behind."""
