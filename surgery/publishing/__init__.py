"""The verb push: an adapter checked, described and uploaded to the Hub."""
