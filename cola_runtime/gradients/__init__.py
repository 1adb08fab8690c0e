"""Taps and their encodings: what leaves the base model and how a device turns it into a gradient."""
