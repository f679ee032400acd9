"""Rendered clips, their captions, and shards of both."""
