"""The value service's durable state."""
