"""Captions of rendered clips, and what an encoder makes of both."""
