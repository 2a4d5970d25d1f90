"""The REST admin app that every service has."""
