"""Base models: a folder or a loaded model, its layers, the names in its files, heads, labels and tied weights."""
