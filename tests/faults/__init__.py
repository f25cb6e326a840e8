"""Every system call of a write fails, or is the last one: `python -m tests.faults`."""
