"""Checks of all that may be otherwise on a GPU than on the CPU: `python -m evaluate gpu`."""
