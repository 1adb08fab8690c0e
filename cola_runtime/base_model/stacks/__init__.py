"""Adapters of many tenants as batched products: one module per kind, what they share, and the cache."""
