"""Readers of files that others wrote, without torch: key layouts, tensors, LoRA."""
