"""gRPC requests: interceptors, stream parsing and field validation."""
