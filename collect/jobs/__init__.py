"""Where jobs execute, and their progress."""
