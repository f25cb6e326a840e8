"""The verb `blend`: a weighted sum of adapters of one base, as one adapter."""
