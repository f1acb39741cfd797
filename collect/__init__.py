"""The collector: trains many networks and records how their weights move."""
