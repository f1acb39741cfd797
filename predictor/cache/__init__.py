"""The feature cache: what a frozen front makes of each sample is kept, and the front skipped."""
