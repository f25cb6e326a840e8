"""Files: safetensors read and written, atomic files and folders, resumed runs, output paths, the Hub's cache."""
