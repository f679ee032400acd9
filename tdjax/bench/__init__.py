"""The command `python -m tdjax.bench`: time and memory of every stage."""
