"""The feature cache: the frozen prefix's outputs are kept by sample, and the prefix is skipped."""
