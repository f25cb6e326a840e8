"""What runs a model over data: examples, gradients, second moments, the divergence of two models."""
