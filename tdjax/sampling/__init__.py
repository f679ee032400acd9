"""Time, noise, and samplers over any velocity function."""
