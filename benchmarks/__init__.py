"""How fast the package is: its own paths against the naive ones, in turn, on the same work."""
