"""The verb `export`: an adapter in the form that a server reads, checked by that server's own rule."""
