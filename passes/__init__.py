"""Rewrites: one per file, one class with its options and one plain function that does the work."""
