"""Adapters under the names of transformers 4 and 5 on tiny models of many architectures, merged, loaded, converted."""
