"""Ragged batches: JaggedTensor, KeyedJaggedTensor, KeyedTensor."""

from recsys_edu.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

__all__ = ["JaggedTensor", "KeyedJaggedTensor", "KeyedTensor"]
