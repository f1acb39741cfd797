"""The freeze predictor: what it sees of a layer, the network, its file, and when it says "freeze"."""
