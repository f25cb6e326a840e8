"""The adapter types that are read: one file each, with the type's names, shapes, settings and weight change."""
