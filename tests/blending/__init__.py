"""Tests of surgery.blending."""
