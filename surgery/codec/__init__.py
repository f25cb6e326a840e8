"""The codec of packed factors: integers of few bits, chosen for the whole model, and their bytes."""
