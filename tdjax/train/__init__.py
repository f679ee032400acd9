"""Training: flow matching, SLA fine-tuning and rCM distillation as pure losses and plain step
functions.

Every step has one signature, `step(state, teacher, batch) -> (state, metrics)`, and is jitted by
whoever loops over it.
"""
