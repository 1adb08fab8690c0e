"""Object storage: datasets and checkpoints as atomic objects."""
