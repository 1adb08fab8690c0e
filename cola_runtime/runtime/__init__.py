"""Composition root: Ray placement and the processes of the service."""
