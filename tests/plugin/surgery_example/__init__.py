"""An example of a package that extends surgery: a method, an adapter type, a form and a file format."""
