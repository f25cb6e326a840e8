"""The machine: devices, memory, threads, processes, standard output, text. Imports nothing of ours but the errors."""
