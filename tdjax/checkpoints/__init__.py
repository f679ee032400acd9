"""Weights on disk: tdjax's own layout, files that others published, where they lie."""
