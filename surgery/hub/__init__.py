"""The Hugging Face Hub: the only part of surgery that may use the network."""
