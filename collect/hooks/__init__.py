"""Hooks that record a training, or change how it trains."""
