"""Every tolerance of the suite, by name, with its reason. A bound is never loosened to make a test
pass."""

import numpy as np

# name: (atol, rtol). "floor" is the float32 - float64 difference of the official code itself, as it
# was measured with the golden files.
TABLE = {
    "dit": (5e-5, 1e-5),  # floor 2.0e-6; the spec's suggestion
    "sla": (5e-5, 1e-5),  # floor 1e-6; block maps are compared exactly
    "vae": (3e-5, 1e-5),  # floor 2.8e-6
    # Whole decoder, values to 2.7; diffusers' bfloat16 is 4.8e-2 from the golden file, ours 3.8e-2.
    "vae_bf16": (1e-1, 0.0),
    "umt5": (5e-5, 1e-5),  # floor 6.1e-6
    "sampler": (1e-6, 1e-5),  # exact in float64; our state is float32
    "fastnorm": (1e-5, 1e-5),  # floor 7e-7
    "int8_y": (0.0, 1e-5),  # order of float32 additions over K blocks
    "train_targets": (1e-4, 1e-4),  # floor 1e-5 relative to values of about 20
    # A difference of two float32 networks over 0.01: a hundred times their rounding.
    "train_targets_difference": (1e-3, 1e-4),
    "float32": (1e-5, 1e-5),  # the same float32 arithmetic in another order
    # One bfloat16 rounding of values of order one, 2^-8, and its accumulation.
    "bf16": (1e-2, 1e-2),
    "oracle_dit": (1e-4, 1e-4),  # diffusers computes the time sinusoid in float32: 2.3e-5 by itself
    # Another float32 implementation, larger widths than the golden file.
    "oracle_vae": (5e-5, 1e-4),
    "oracle_umt5": (1e-4, 1e-4),  # likewise
}


def assert_close(actual, expected, name, what=""):
    """Compare with the named tolerance; the message gives relative L2 and the worst element."""
    atol, rtol = TABLE[name]
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    error = np.abs(a - e)
    bad = ~(error <= atol + rtol * np.abs(e))  # a NaN is bad
    if bad.any():
        # Of a number alone: index 0 of shape (), which is ().
        largest = np.nanargmax(np.where(np.isnan(error), np.inf, error))
        worst = np.unravel_index(largest, e.shape)
        l2 = np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30)
        raise AssertionError(
            f"{what or 'arrays'}: {bad.sum()} of {bad.size} elements outside {name} (atol {atol},"
            f" rtol {rtol}); relative L2 {l2:.2e}; worst at {tuple(int(i) for i in worst)}:"
            f" {a[worst]:.7g}, expected {e[worst]:.7g}"
        )
