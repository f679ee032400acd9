"""From a request to frames: plan, stages, components, result."""
