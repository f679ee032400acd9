"""Array functions of the video transformer: each op has a reference in plain JAX, which is its
specification, and `impl`."""

from pallas_kernels.flash_attention import attention
from pallas_kernels.int8_matmul import int8_linear
from pallas_kernels.sage_attention import sage_sparse_linear_attention
from pallas_kernels.sparse_attention import sparse_linear_attention

__all__ = ["attention", "int8_linear", "sage_sparse_linear_attention", "sparse_linear_attention"]
