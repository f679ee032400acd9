"""Attention over lists of key blocks with float scores, by the loop of `online_softmax`."""

from __future__ import annotations

from pallas_kernels.online_softmax import attend, kernel_name, key_block
from pallas_kernels.primitives import LOG2E, dot, load
from pallas_kernels.tuning import tile


def forward(q, k, v, blocks, block_q, block_k, *, linear=None, save=False, interpret=False):
    """o, or (o, o_s, lse) if `save`: what `online_softmax.attend` says, with float scores; q k v [b
    l h k], blocks int32 [b h q_blocks chosen]."""
    return attend(
        _float_scores,
        (q,),
        (k,),
        v,
        blocks,
        block_q,
        block_k,
        linear=linear,
        save=save,
        interpret=interpret,
        at=tile("sparse_attention", kernel_name(block_q)),
    )


def _float_scores(plan, rows, queries, keys):
    """Scores q k^T summed in float32; the factor holds 1/sqrt(k) and log2(e)."""
    q = load(queries[0], rows)
    factor = LOG2E * q.shape[-1] ** -0.5
    scores = lambda j: (dot(q, key_block(plan, keys[0], j), (1, 1)), factor)
    return scores, None
