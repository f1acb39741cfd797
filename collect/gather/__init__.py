"""Gathers trajectories and outcomes: suite file -> plan -> jobs -> one packed file."""
