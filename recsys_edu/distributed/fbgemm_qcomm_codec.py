"""Lower-precision communication: embeddings and their gradients travel in fewer bytes than they are computed in.

    precision   bytes per number       what is lost
    fp32        4                      nothing
    fp16        2                      numbers beyond 65,504; about 3 digits
    bf16        2                      about 2 digits
    int8        1, and 8 per row       steps of (max - min) / 255 of each row

Forward and backward are chosen apart, for gradients are more delicate than activations. The name of this file is
TorchRec's; casts are PyTorch's, the int8 rows FBGEMM's where it runs.

Counterpart: torchrec.distributed.fbgemm_qcomm_codec.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique
from typing import Any

import torch
from torch import Tensor

from recsys_edu.distributed.types import CommOp, NoOpQuantizedCommCodec, QuantizedCommCodec, QuantizedCommCodecs
from recsys_edu.kernels.backend import use_fbgemm

SCALE_AND_MINIMUM_BYTES = 8  # two float32 behind every row


@unique
class CommType(Enum):
    """Precision of what travels. FP8 and MX4 are TorchRec's names; they need FBGEMM's CUDA kernels."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    MX4 = "mx4"


@dataclass
class QCommsConfig:
    """Precision forward and backward; a loss scale multiplies gradients before they are cast, and divides after.

    >>> QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16).forward_precision
    <CommType.FP16: 'fp16'>

    The fields from `fp8_quantize_dim` on belong to formats that are not built here; a value is refused.
    """

    forward_precision: CommType = CommType.FP32
    backward_precision: CommType = CommType.FP32
    forward_loss_scale: float | None = None
    backward_loss_scale: float | None = None
    fp8_quantize_dim: int | None = None
    fp8_quantize_dim_bwd: int | None = None
    fp8_bwd_uses_143: bool | None = False
    fp8_output_dtype: Any | None = None
    mx4_quantize_dim: int | None = None
    mx4_quantize_dim_bwd: int | None = None
    mx4_rounding_mode: Any | None = None
    output_dtype: Any | None = None

    def __post_init__(self) -> None:
        for name in ("fp8_quantize_dim", "fp8_output_dtype", "mx4_quantize_dim", "mx4_rounding_mode", "output_dtype"):
            if getattr(self, name) is not None:
                raise NotImplementedError(f"QCommsConfig.{name}: FP8 and MX4 communication are not built here")


class CastCodec(QuantizedCommCodec):
    """Rows cast to a shorter floating type, scaled first so that small numbers survive."""

    def __init__(self, dtype: torch.dtype, loss_scale: float | None = None) -> None:
        self._dtype, self._scale = dtype, loss_scale

    def encode(self, input_tensor: Tensor, ctx: Any | None = None) -> Tensor:
        return (input_tensor if self._scale is None else input_tensor * self._scale).to(self._dtype)

    def decode(self, input_grad: Tensor, ctx: Any | None = None) -> Tensor:
        rows = input_grad.float()
        return rows if self._scale is None else rows / self._scale

    @property
    def quantized_dtype(self) -> torch.dtype:
        return self._dtype

    def calc_quantized_size(self, input_len: int, ctx: Any | None = None) -> int:
        return input_len


class RowwiseInt8Codec(QuantizedCommCodec):
    """Rows of bytes, each with its own scale and minimum: value = byte * scale + minimum."""

    def encode(self, input_tensor: Tensor, ctx: Any | None = None) -> Tensor:
        if input_tensor.numel() == 0:
            return torch.empty(len(input_tensor), self.calc_quantized_size(input_tensor.shape[1]), dtype=torch.uint8)
        if use_fbgemm(input_tensor.device):
            return torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(input_tensor.contiguous())
        return encode_rows_pytorch(input_tensor)

    def decode(self, input_grad: Tensor, ctx: Any | None = None) -> Tensor:
        if input_grad.numel() == 0:
            return torch.empty(len(input_grad), max(input_grad.shape[1] - SCALE_AND_MINIMUM_BYTES, 0))
        if use_fbgemm(input_grad.device):
            return torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(input_grad.contiguous())
        return decode_rows_pytorch(input_grad)

    @property
    def quantized_dtype(self) -> torch.dtype:
        return torch.uint8

    def calc_quantized_size(self, input_len: int, ctx: Any | None = None) -> int:
        return input_len + SCALE_AND_MINIMUM_BYTES if input_len else 0


def encode_rows_pytorch(rows_ND: Tensor) -> Tensor:
    """[N, D] float32 to [N, D + 8] uint8: D bytes, then scale and minimum as float32."""
    minimum_N1, maximum_N1 = rows_ND.amin(1, keepdim=True), rows_ND.amax(1, keepdim=True)
    range_N1 = maximum_N1 - minimum_N1
    inverse_N1 = 255.0 / (range_N1 + 1e-8)
    bytes_ND = ((rows_ND - minimum_N1) * inverse_N1).round().clamp(0, 255).to(torch.uint8)
    tail_N2 = torch.cat([range_N1 / 255.0, minimum_N1], dim=1).contiguous().view(torch.uint8)
    return torch.cat([bytes_ND, tail_N2], dim=1)


def decode_rows_pytorch(bytes_NE: Tensor) -> Tensor:
    """The inverse of `encode_rows_pytorch`, to within half a step."""
    tail_N2 = bytes_NE[:, -SCALE_AND_MINIMUM_BYTES:].contiguous().view(torch.float32)
    return bytes_NE[:, :-SCALE_AND_MINIMUM_BYTES].float() * tail_N2[:, :1] + tail_N2[:, 1:]


def get_qcomm_codecs(qcomms_config: QCommsConfig | None) -> QuantizedCommCodecs:
    """The pair of codecs that a config asks for; without one nothing is encoded.

    Raises:
        NotImplementedError: FP8 or MX4.
    """
    config = qcomms_config or QCommsConfig()
    return QuantizedCommCodecs(
        forward=_codec(config.forward_precision, config.forward_loss_scale),
        backward=_codec(config.backward_precision, config.backward_loss_scale),
    )


def get_qcomm_codecs_registry(
    qcomms_config: QCommsConfig, comm_ops: list[CommOp] | None = None, device: torch.device | None = None
) -> dict[str, QuantizedCommCodecs] | None:
    """Codecs by exchange, to hand to a sharder: `EmbeddingBagCollectionSharder(qcomm_codecs_registry=...)`.

    Pooled embeddings travel by the codec of POOLED_EMBEDDINGS_ALL_TO_ALL whatever the sharding type, since here all of
    them travel in one all-to-all.
    """
    del device  # both codecs run where their tensors are
    return {op.name: get_qcomm_codecs(qcomms_config) for op in comm_ops or list(CommOp)}


def _codec(precision: CommType, loss_scale: float | None) -> QuantizedCommCodec:
    if precision is CommType.FP32:
        return NoOpQuantizedCommCodec()
    if precision is CommType.INT8:
        return RowwiseInt8Codec()
    dtypes = {CommType.FP16: torch.float16, CommType.BF16: torch.bfloat16}
    if precision not in dtypes:
        raise NotImplementedError(f"{precision}: expected FP32, FP16, BF16 or INT8; FP8 and MX4 are not built here")
    return CastCodec(dtypes[precision], loss_scale)
