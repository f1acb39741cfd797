"""A linear head fitted to the pretrained features before the first step."""
