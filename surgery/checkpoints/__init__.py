"""Files: base weights read one tensor at a time, adapter folders read and written whole."""
