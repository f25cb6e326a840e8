"""From one adapter form to another, one module per direction."""
