"""An adapter folder and what is in it: names, configuration, contents, weight changes."""
