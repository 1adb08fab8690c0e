"""The frozen base model: its sites, the tapped forward and backward, the bank of adapters."""
