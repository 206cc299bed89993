"""Loading a model, and what FADE asks of its geometry."""
