"""The speed of the package: its own paths against naive ones, alternating, on the same work."""
