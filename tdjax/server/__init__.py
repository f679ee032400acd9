"""A service: videos over HTTP, as OpenAI's clients ask for them. The web process imports no jax."""
