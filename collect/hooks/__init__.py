"""What watches or steers a training: one hook a file."""
