"""The verb inspect: what an adapter holds, layer by layer."""
