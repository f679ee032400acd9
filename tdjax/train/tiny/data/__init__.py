"""Rendered clips, their captions, and what an encoder makes of both."""
