"""The API: use cases, authentication, gRPC."""
