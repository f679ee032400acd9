"""The columns of the tiny recipe's table."""

from __future__ import annotations

from tdjax.train.evaluate.sheets import Column

COLUMNS = tuple(
    Column(key=key, title=title, form=form)
    for key, title, form in (
        ("clips", "clips", ".0f"),
        ("all", "all attributes", ".1%"),
        ("shape", "shape", ".1%"),
        ("colour", "colour", ".1%"),
        ("motion", "motion", ".1%"),
        ("speed_error", "speed error, px/frame", ".3f"),
        ("constancy", "constancy, px", ".3f"),
        ("area_cv", "area CV", ".3f"),
        ("fd_pca", "FD-pca", ".3g"),
        ("fd_random", "FD-rand", ".3g"),
        ("diversity", "diversity", ".2f"),
        ("psnr", "PSNR to parent, dB", ".1f"),
        ("cpu_seconds", "s, 2-core CPU", ".2f"),
        ("gpu_ms", "ms, GPU", ".1f"),
        ("megabytes", "MB", ".1f"),
    )
)
