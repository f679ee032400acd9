"""The Mosaic GPU product of 8-bit rows, interpreted with threads, barriers and copies, against the
reference."""

import described
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import put
from tolerances import assert_close

from pallas_kernels import mosaic as shared
from pallas_kernels import tuning
from pallas_kernels.int8_matmul import mosaic, reference
from pallas_kernels.int8_matmul.mosaic import SMALL, WIDE, Tile, row_product, tile_for
from pallas_kernels.mosaic import product_refusal
from pallas_kernels.quantized import QTensor, quantize_rows

F8 = jnp.float8_e4m3fn
interpreted = pytest.mark.skipif(shared.unavailable() is not None, reason=str(shared.unavailable()))


def operands(m, k, n, dtype):
    rng = np.random.default_rng(m + k + n)
    x, weight = (put(rng.normal(size=(rows, k)), jnp.float32) for rows in (m, n))
    bias = put(rng.normal(size=n), jnp.float32)
    quantized = (quantize_rows(a, dtype) for a in (x, weight * k**-0.5))
    return *quantized, bias


def shapes(m, k, n, x_dtype=jnp.int8, weight_dtype=jnp.int8):
    return jax.ShapeDtypeStruct((m, k), x_dtype), jax.ShapeDtypeStruct((n, k), weight_dtype)


# ragged rows and columns, more tiles than programs, rings that go round more than once
@interpreted
@pytest.mark.parametrize(
    "m, k, n, dtype, tile",
    [
        (300, 384, 328, jnp.int8, Tile(columns=256, stages=2, cluster=2)),
        (200, 256, 136, jnp.int8, Tile(columns=128, stages=3, cluster=1)),
        (200, 128, 72, F8, Tile(columns=128, stages=2, cluster=1)),
    ],
)
def test_product(m, k, n, dtype, tile):
    x, weight, bias = operands(m, k, n, dtype)
    product = reference.row_product if dtype == jnp.int8 else reference.fp8_product
    run = lambda *args: row_product(*args, jnp.bfloat16, tile=tile, interpret=True)
    y = jax.jit(run)(x, weight, bias)
    assert y.dtype == jnp.bfloat16
    assert_close(y, product(x, weight, bias, out_dtype=jnp.float32), "bf16")


@interpreted
def test_without_a_bias_in_float16():
    x, weight, _ = operands(64, 256, 64, jnp.int8)
    tile = Tile(columns=128, stages=2, cluster=1)
    run = lambda *args: row_product(*args, None, jnp.float16, tile=tile, interpret=True)
    y = jax.jit(run)(x, weight)
    assert y.dtype == jnp.float16
    assert_close(y, reference.row_product(x, weight, None, out_dtype=jnp.float32), "bf16")


@interpreted
@pytest.mark.parametrize(
    "m, n, gated, tile",
    [  # more rows than a tile and fewer, a last tile without whole stripes, and a last stripe
        (300, 320, True, Tile(columns=256, stages=2, cluster=2)),
        (100, 64, False, Tile(columns=128, stages=2, cluster=1)),
        (136, 72, True, Tile(columns=128, stages=2, cluster=1)),
    ],
)
def test_onto_a_stream(m, n, gated, tile):
    """Where whole stripes are, the sum is rounded once: as near as a bfloat16 is."""
    x, weight, bias = operands(m, 256, n, jnp.int8)
    rng = np.random.default_rng(7)
    stream = put(rng.normal(size=(m, n)), jnp.bfloat16)
    gate = put(rng.normal(size=n), jnp.float32) if gated else None
    run = lambda x, weight, bias, stream, gate: row_product(
        x, weight, bias, jnp.bfloat16, stream=stream, gate=gate, tile=tile, interpret=True
    )
    y = np.asarray(jax.jit(run)(x, weight, bias.astype(jnp.bfloat16), stream, gate), np.float32)
    args = x, weight, bias.astype(jnp.bfloat16), None, stream.astype(jnp.float32), gate
    expected = np.asarray(reference.row_product(*args, out_dtype=jnp.float32))
    assert_close(y, expected, "bf16")
    if n % 64 == 0:
        once = np.asarray(jnp.asarray(expected).astype(jnp.bfloat16), np.float32)
        assert (y != once).mean() < 1e-2


@interpreted
@pytest.mark.parametrize("n", [256, 192])  # groups of whole stripes, and of one and a half
def test_columns_in_groups(n):
    x, weight, bias = operands(136, 128, n, jnp.int8)
    tile = Tile(columns=128, stages=2, cluster=1)
    run = lambda groups: row_product(
        x, weight, bias, jnp.bfloat16, groups=groups, tile=tile, interpret=True
    )
    y, whole = jax.jit(lambda: (run(2), run(1)))()
    assert y.shape == (2, 136, n // 2)
    np.testing.assert_array_equal(np.concatenate(list(np.asarray(y)), 1), whole)


@interpreted
def test_a_row_that_is_not_finite_stays_alone():
    x, weight, bias = operands(130, 128, 64, jnp.int8)
    x = QTensor(x.values, x.scale.at[7].set(jnp.nan))
    tile = Tile(columns=128, stages=2, cluster=1)
    run = lambda *args: row_product(*args, jnp.bfloat16, tile=tile, interpret=True)
    y = np.asarray(jax.jit(run)(x, weight, bias), np.float32)
    assert (np.isfinite(y).all(1) == (np.arange(130) != 7)).all()


def test_small_products_get_small_tiles():
    assert tile_for(512, 3072, 132) == SMALL
    assert tile_for(32760, 1536, 132) == WIDE


def test_what_it_takes():
    assert product_refusal(*shapes(32760, 1536, 8960), jnp.bfloat16) is None
    assert product_refusal(*shapes(75600, 5120, 13824, F8, F8), jnp.bfloat16) is None
    assert "k is 1544; allowed: multiples of 128; nearest: 1664" in product_refusal(
        *shapes(64, 1544, 64), jnp.bfloat16
    )
    assert "n is 62; allowed: multiples of 8; nearest: 64" in product_refusal(
        *shapes(64, 128, 62), jnp.bfloat16
    )
    assert "values are int8 and float8_e4m3fn" in product_refusal(
        *shapes(64, 128, 64, jnp.int8, F8), jnp.bfloat16
    )
    assert "the output is float32; allowed: bfloat16, float16" in product_refusal(
        *shapes(64, 128, 64), jnp.float32
    )


def test_errors_say_what_to_do(monkeypatch):
    x, weight, bias = operands(64, 128, 62, jnp.int8)
    with pytest.raises(ValueError, match='n is 62.*\nimpl="auto" and impl="reference" take it'):
        row_product(x, weight, bias, jnp.bfloat16)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    x, weight, bias = operands(64, 128, 64, jnp.int8)
    with pytest.raises(ValueError, match="need jax 0.11 or newer; this is jax 0.10.2"):
        row_product(x, weight, bias, jnp.bfloat16)


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    device = type("Device", (), {"platform": "gpu", "device_kind": "card"})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    device.compute_capability = "8.9"
    expected = "need a Hopper GPU (compute capability 9.0); this is card"
    assert expected in shared.unavailable() and not shared.at_hand()
    assert tuning.family() == "sm89"
    device.compute_capability = "9.0"
    assert shared.unavailable() is None and shared.at_hand()
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "need jax 0.11 or newer" in shared.unavailable() and not shared.at_hand()


def test_tiles_fit_shared_memory():
    for tile in (WIDE, SMALL):
        ring = tile.stages * (mosaic.HEIGHT + tile.columns) * mosaic.SLICE
        stores = 2 * mosaic.WARPGROUPS * mosaic.SLOTS * mosaic.ROWS * mosaic.STRIPE
        assert ring + stores + 8 * tile.columns + 1024 <= 227 * 1024


@interpreted
@pytest.mark.parametrize("m", [1, 18900])
def test_rows_that_do_not_come_out_even_for_the_copy_engine(m):
    """The interpreter takes them; the compiler wants eights."""
    x, weight = shapes(m, 1536, 1536)
    scale = lambda n: jax.ShapeDtypeStruct((n,), jnp.float32)
    run = lambda x, x_scale, w, w_scale: row_product(
        QTensor(x, x_scale), QTensor(w, w_scale), None, jnp.bfloat16
    )
    args = x, scale(m), weight, scale(1536)
    described.lower(described.trace(jax.jit(run), *args))
