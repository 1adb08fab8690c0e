"""The SDK. Imports neither torch nor ray."""
