"""Eviction policies that the core brings, one a file."""
