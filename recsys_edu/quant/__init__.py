"""Quantised collections: int8, int4, int2, fp16 and fp8 tables that serve.

Read kernels/quantized_rows.py (bytes) and kernels/quantized.py (lookup) first, then tables.py, embedding_modules.py.
"""

from recsys_edu.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

__all__ = ["EmbeddingBagCollection", "EmbeddingCollection"]
