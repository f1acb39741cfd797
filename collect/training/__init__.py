"""The training loop: its state, checkpoints, device, optimizer and random numbers."""
