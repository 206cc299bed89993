"""Ops on the attention path: the torch oracles, and the choice of an implementation."""
