"""The evaluator: fresh trainings under every policy, compared at equal accuracy."""
