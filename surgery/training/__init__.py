"""Passes over data: what becomes a batch, the gradients that a start needs."""
