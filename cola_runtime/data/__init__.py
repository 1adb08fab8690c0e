"""Datasets: formats, validation with line numbers, tokenisation, the resumable cursor."""
