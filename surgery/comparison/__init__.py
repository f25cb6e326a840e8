"""The verb compare: two adapters side by side, in their weights and in a model's answers."""
