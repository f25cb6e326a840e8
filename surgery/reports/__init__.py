"""What surgery tells about its results: the `Report`, and its tables."""
