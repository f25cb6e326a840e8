"""Weight changes as operators: applied, measured and factored without forming the matrix."""
