"""File formats of adapters: PEFT's own and those of other tools, one file each."""
