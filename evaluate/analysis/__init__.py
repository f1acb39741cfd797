"""What results mean: paired statistics, Pareto fronts, areas, the oracle."""
