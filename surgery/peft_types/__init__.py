"""Our adapter types inside PEFT: one tuner, one layer, for all of them."""
