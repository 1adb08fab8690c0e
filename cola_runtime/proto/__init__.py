"""Generated from protos/ by `make proto`; checked in, never edited."""
