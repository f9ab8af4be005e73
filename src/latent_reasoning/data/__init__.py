"""Rows: sources, filters and splits, the generator, sequence format and collation."""
