"""What "frozen" means, and what stands around a model while layers freeze."""
