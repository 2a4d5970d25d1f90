"""What every service shares: configuration, logging, metrics, the gRPC server, the admin app, the life cycle."""
