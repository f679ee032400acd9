"""The command `python -m tdjax.generate`: options, jobs, output files."""
