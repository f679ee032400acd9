"""Published checkpoints to tdjax's layout and back: `python -m convert SRC... DST`. Never imports
torch."""
