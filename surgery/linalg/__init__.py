"""Tensor mathematics: bare tensors in, bare tensors out. Knows no files, no models and no adapter methods."""
