"""The verb init: an adapter at a method's start, from a base model."""
