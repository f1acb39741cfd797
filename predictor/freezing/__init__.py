"""Freezing itself: which layers there are, what frozen means, and who carries it out."""
