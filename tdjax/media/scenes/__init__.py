"""Rendered clips of one moving shape: what they can show, how they are drawn, and what a clip
shows."""
