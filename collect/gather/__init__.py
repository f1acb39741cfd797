"""Gathering trajectories and outcomes: plan, jobs, file."""
