"""What several ops ask of their arguments. Each check raises ValueError, which says what was given
and what is expected."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.primitives import blocks, power_of_two


def check_attention(q, k, v):
    """The shapes are q [b l h k] and k, v [b s h k], of one floating dtype."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape
    if not fits or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; expected q [b l h k] and k, v [b s"
            " h k]"
        )
    if not (q.dtype == k.dtype == v.dtype and jnp.issubdtype(q.dtype, jnp.floating)):
        raise ValueError(
            f"attention: dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one floating dtype for"
            " all three"
        )


def check_block_list(q, k, v, lists, block_q: int):
    """`check_attention`, and the lists of key blocks fit the queries."""
    check_attention(q, k, v)
    expected = (q.shape[0], q.shape[2], blocks(q.shape[1], block_q))
    if lists.ndim != 4 or lists.shape[:3] != expected or lists.dtype != jnp.int32:
        raise ValueError(
            f"sparse_attention: block list {lists.dtype} {lists.shape}; expected int32"
            f" {(*expected, 'chosen')}"
        )


def counted_keys(k, keys: int | None) -> int:
    """Returns how many of k [b s h k] count: `keys`, by default all."""
    s = k.shape[1]
    if keys is None:
        return s
    if not 1 <= keys <= s:
        raise ValueError(f"sparse_linear_attention: keys is {keys}; allowed: 1 to {s}, those of k")
    return keys


def check_means(q, keys: int, means, block_q: int, block_k: int):
    """The means, if any, are float32 [b h blocks k] of q and of so many keys."""
    if means is None:
        return
    b, l, h, d = q.shape
    expected = [(b, h, blocks(n, block), d) for n, block in ((l, block_q), (keys, block_k))]
    if [m.shape for m in means] != expected or any(m.dtype != jnp.float32 for m in means):
        given = ", ".join(f"{m.dtype} {m.shape}" for m in means)
        raise ValueError(
            f"sparse_linear_attention: means {given}; expected float32 {expected[0]} and"
            f" {expected[1]}"
        )


def check_power_of_two(op: str, name: str, size: int):
    """A kernel takes the size."""
    reason = not_a_power_of_two(size)
    if reason:
        raise ValueError(
            f"{op}: {name} is {size}; the kernel takes {reason}; impl='reference' takes any"
        )


def not_a_power_of_two(size: int) -> str | None:
    """What kernels take instead of a size that is no power of two; None if it is one."""
    if size & (size - 1) == 0:
        return None
    low = power_of_two(size) // 2
    return f"powers of two; nearest: {low} and {2 * low}"
