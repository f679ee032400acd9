"""tdjax: few-step video generation in JAX. `tdjax.load(model)` gives a pipeline; `pipe(prompt)` a
video."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdjax.config import DiTConfig, SamplerConfig, SLAConfig, TextConfig, VAEConfig, VideoSize
    from tdjax.errors import TdjaxError
    from tdjax.pipeline.load import load
    from tdjax.pipeline.pipeline import Pipeline
    from tdjax.pipeline.result import Result
    from tdjax.precision import Policy
    from tdjax.presets import PRESETS

__version__ = "0.1.0"

__all__ = [
    "load",
    "Pipeline",
    "Result",
    "PRESETS",
    "DiTConfig",
    "SLAConfig",
    "SamplerConfig",
    "TextConfig",
    "VAEConfig",
    "VideoSize",
    "Policy",
    "TdjaxError",
    "__version__",
]

# Public names by the module that owns them. They are imported on first use (PEP 562), so that
# `import tdjax` costs nothing and starts no device.
_PUBLIC = {
    "load": "tdjax.pipeline.load",
    "Pipeline": "tdjax.pipeline.pipeline",
    "Result": "tdjax.pipeline.result",
    "PRESETS": "tdjax.presets",
    "DiTConfig": "tdjax.config",
    "SLAConfig": "tdjax.config",
    "SamplerConfig": "tdjax.config",
    "TextConfig": "tdjax.config",
    "VAEConfig": "tdjax.config",
    "VideoSize": "tdjax.config",
    "Policy": "tdjax.precision",
    "TdjaxError": "tdjax.errors",
}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tdjax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return __all__
