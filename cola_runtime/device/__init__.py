"""A low-cost worker that trains adapters: sessions, optimizers, checkpoints, the join loop."""
