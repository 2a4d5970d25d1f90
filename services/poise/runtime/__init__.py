"""Shared by the services: configuration, gRPC server, admin app, network, files, logging, tracing."""
