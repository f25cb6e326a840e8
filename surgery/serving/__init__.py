"""Serving: a store of packed adapters, expanded for a server on first use, and the plugin by which vLLM finds them."""
