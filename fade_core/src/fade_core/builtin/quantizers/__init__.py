"""Quantizers that the core brings: uniform codes and full precision."""
