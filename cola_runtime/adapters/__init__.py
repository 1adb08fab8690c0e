"""The mathematics of one adapter: its factors, its gradient, its PEFT files."""
