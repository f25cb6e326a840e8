"""Compatibility: adapters that earlier versions wrote, and the released versions of PEFT and transformers."""
