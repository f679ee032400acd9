"""Meshes of devices, and where arrays lie on them."""
