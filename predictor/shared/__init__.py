"""What the four packages share: files written whole, command-line flags, tracking, and users' own code by its name."""
