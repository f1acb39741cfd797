"""What "frozen" means, and how DDP, FSDP2, torch.compile and AMP follow a frozen set that changes."""
