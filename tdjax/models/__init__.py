"""The networks (flax.nnx modules) and the layers that they are made of."""
