"""Attention inside the rows of a ragged batch: nobody attends across rows, and no row is padded to the longest.

    rows      a b c | d | | e f            causal: each position sees itself and what came before it in its row
    pairs     a>a  b>a b>b  c>a c>b c>c    d>d    e>e  f>e f>f

Padded to [B, T] the work is B * T * T whatever the lengths; here it is about the sum of the squared lengths. Three ways
that give the same numbers:

| function | how | used |
|---|---|---|
| `attend_pairs` | lists every pair, a softmax over each query's pairs | the specification and the tests' oracle |
| `attend_grouped` | rows of about the same length share a call of PyTorch's fused attention | by default |
| `attend_fbgemm` | FBGEMM's jagged-times-dense products: queries jagged, keys padded | on request |

Shapes: N positions of all rows, H heads, D columns per head, B rows, P pairs, G rows of a group, T its longest row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.kernels.jagged_ops import complete_cumsum, jagged_to_padded_dense
from recsys_edu.sparse.jagged import JaggedTensor

GROUP_STEP = 8
"""Rows whose lengths round up to the same multiple of this share a call, so fewer than that are padding."""


def jagged_attention(
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    offsets: Tensor,
    *,
    causal: bool,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`softmax(q k' / sqrt(D)) v` within every row; with `causal` a position sees no later one.

    >>> q = k = torch.zeros(3, 1, 1)              # equal logits: every position takes the mean of what it sees
    >>> v = torch.tensor([1.0, 3.0, 7.0]).view(3, 1, 1)
    >>> jagged_attention(q, k, v, torch.tensor([0, 2, 3]), causal=True).flatten().tolist()
    [1.0, 2.0, 7.0]

    Args:
        query_NHD, key_NHD, value_NHD: float, the positions of row 0, then of row 1, ...
        offsets: `[B + 1]` int32 or int64, where each row begins; empty rows are allowed.
        dropout: share of attention weights to drop.
        backend: "pytorch" (grouped, the default), "fbgemm", or "pairs".

    Returns:
        `[N, H, D]`; float32 in, float32 out.

    Raises:
        ValueError: shapes that do not fit, offsets that do not end at N, or an unknown or missing backend.
    """
    _check(query_NHD, key_NHD, value_NHD, offsets, backend)
    if len(query_NHD) == 0:
        return query_NHD + key_NHD + value_NHD  # empty, yet a function of all three
    attend = {"fbgemm": attend_fbgemm, "pairs": attend_pairs}.get(backend or "pytorch", attend_grouped)
    return attend(query_NHD, key_NHD, value_NHD, offsets, causal, dropout)


def attend_pairs(
    query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, offsets: Tensor, causal: bool, dropout: float = 0.0
) -> Tensor:
    """The specification: P = sum of squared lengths (causal: half of it) dot products, and memory for P * D numbers."""
    query_P, key_P = attention_pairs(offsets, causal)
    logits_PH = (query_NHD[query_P] * key_NHD[key_P]).sum(-1) / query_NHD.size(-1) ** 0.5
    weights_PH = F.dropout(softmax_of_queries(logits_PH, query_P, len(query_NHD)), dropout)
    return torch.zeros_like(value_NHD).index_add(0, query_P, weights_PH[..., None] * value_NHD[key_P])


def attention_pairs(offsets: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Which position attends to which: int64 `(query_P, key_P)`, query by query.

    >>> attention_pairs(torch.tensor([0, 2, 3]), causal=True)
    (tensor([0, 1, 1, 2]), tensor([0, 0, 1, 2]))
    """
    lengths_B = offsets.diff().long()
    starts_N = torch.repeat_interleave(offsets[:-1].long(), lengths_B)
    positions_N = torch.arange(len(starts_N), device=offsets.device)
    seen_N = positions_N - starts_N + 1 if causal else torch.repeat_interleave(lengths_B, lengths_B)
    query_P = torch.repeat_interleave(positions_N, seen_N)
    first_pair_N = complete_cumsum(seen_N)[:-1]
    return query_P, starts_N[query_P] + torch.arange(len(query_P), device=offsets.device) - first_pair_N[query_P]


def softmax_of_queries(logits_PH: Tensor, query_P: Tensor, num_queries: int) -> Tensor:
    """Softmax over the pairs of each query."""
    owner_PH = query_P[:, None].expand_as(logits_PH)
    highest_NH = logits_PH.detach().new_full((num_queries, logits_PH.size(1)), float("-inf"))
    highest_NH = highest_NH.scatter_reduce(0, owner_PH, logits_PH.detach(), "amax")
    exp_PH = (logits_PH - highest_NH[query_P]).exp()
    return exp_PH / torch.zeros_like(highest_NH).index_add(0, query_P, exp_PH)[query_P]


def attend_grouped(
    query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, offsets: Tensor, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Rows of about the same length, a little padded, in one call of PyTorch's fused attention."""
    sources, answers = [], []
    for source_GT, filled_GT in row_groups(offsets):
        query, key, value = (
            part[source_GT].transpose(1, 2) for part in (query_NHD, key_NHD, value_NHD)
        )  # [G, H, T, D]
        # A real query sees no padding where it sees no later position; elsewhere the padding is masked.
        mask = None if causal else filled_GT[:, None, None, :]
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        sources.append(source_GT[filled_GT])
        answers.append(answer.transpose(1, 2)[filled_GT])
    return torch.cat(answers)[torch.cat(sources).argsort()]


def row_groups(offsets: Tensor, step: int = GROUP_STEP) -> list[tuple[Tensor, Tensor]]:
    """Rows by length, rounded up to a multiple of `step`: per group the positions `[G, T]`, and which are real.

    >>> [source.tolist() for source, _ in row_groups(torch.tensor([0, 1, 4, 6]), step=2)]
    [[[0, 0], [4, 5]], [[1, 2, 3]]]

    Padding repeats the row's last position, so that every index is valid. Empty rows are in no group.
    """
    lengths_B = offsets.diff()
    steps_B = (lengths_B + step - 1) // step
    groups = []
    for size in steps_B.unique().tolist():  # host sync: one call per distinct size, so the sizes are needed here
        if size == 0:
            continue
        rows_G = (steps_B == size).nonzero().flatten()
        column_T = torch.arange(lengths_B[rows_G].max(), device=offsets.device)  # host sync: the shape of the group
        filled_GT = column_T < lengths_B[rows_G, None]
        last_G1 = offsets[rows_G + 1, None] - 1
        groups.append((torch.minimum(offsets[rows_G, None] + column_T, last_G1).long(), filled_GT))
    return groups


def attend_fbgemm(
    query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, offsets: Tensor, causal: bool, dropout: float = 0.0
) -> Tensor:
    """FBGEMM's jagged products: the queries stay jagged, keys and values are padded to the longest row.

    Every head is a batch of its own: B * H rows, head after head.
    """
    num_positions, num_heads, dim = query_NHD.shape
    longest = int(offsets.diff().max())  # host sync: the shape of the padded keys
    shift_H1 = num_positions * torch.arange(num_heads, device=offsets.device)[:, None]
    starts = (offsets[:-1] + shift_H1).flatten()
    head_offsets = torch.cat([starts, starts.new_tensor([num_positions * num_heads])])  # [H * B + 1]
    query, key, value = (part.transpose(0, 1).reshape(-1, dim) for part in (query_NHD, key_NHD, value_NHD))
    padded_key, padded_value = (jagged_to_padded_dense(part, head_offsets, longest) for part in (key, value))
    logits, _ = torch.ops.fbgemm.jagged_dense_bmm(
        query.contiguous(), head_offsets, padded_key.transpose(1, 2).contiguous(), longest
    )  # [H * N, T]
    weights = (logits / dim**0.5).masked_fill(~_sees(offsets, longest, causal).repeat(num_heads, 1), float("-inf"))
    weights = F.dropout(weights.softmax(1), dropout)
    answer, _ = torch.ops.fbgemm.jagged_dense_bmm(weights, head_offsets, padded_value.contiguous(), longest)
    return answer.view(num_heads, num_positions, dim).transpose(0, 1)


def _sees(offsets: Tensor, longest: int, causal: bool) -> Tensor:
    """bool `[N, T]`: may position n attend to place t of its row?"""
    lengths_B = offsets.diff()
    ends_N = torch.repeat_interleave(lengths_B, lengths_B)
    if causal:
        starts_N = torch.repeat_interleave(offsets[:-1], lengths_B)
        ends_N = torch.arange(len(starts_N), device=offsets.device) - starts_N + 1
    return torch.arange(longest, device=offsets.device) < ends_N[:, None]


def positions_in_rows(offsets: Tensor) -> Tensor:
    """The place of every value in its row, int64 `[N]`.

    >>> positions_in_rows(torch.tensor([0, 2, 2, 5]))
    tensor([0, 1, 0, 1, 2])
    """
    starts_N = torch.repeat_interleave(offsets[:-1].long(), offsets.diff())
    return torch.arange(len(starts_N), device=offsets.device) - starts_N


class JaggedSelfAttention(nn.Module):
    """Multi-head self-attention over the rows of a JaggedTensor.

    >>> rows = JaggedTensor(torch.randn(3, 8), lengths=torch.tensor([2, 0, 1]))
    >>> JaggedSelfAttention(8, num_heads=2, causal=True)(rows).values().shape
    torch.Size([3, 8])

    dim must be a multiple of num_heads. Parameters are `in_proj` (queries, keys, values) and `out_proj`.

    Raises:
        ValueError: `dim` is not a multiple of `num_heads`.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        causal: bool,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads, self.causal, self.dropout, self.backend = num_heads, causal, dropout, backend
        self.in_proj = nn.Linear(dim, 3 * dim, device=device)
        self.out_proj = nn.Linear(dim, dim, device=device)

    def forward(self, rows: JaggedTensor) -> JaggedTensor:
        query, key, value = self._projected(rows)
        attended = jagged_attention(
            query, key, value, rows.offsets(), causal=self.causal, dropout=self.dropout if self.training else 0.0,
            backend=self.backend,
        )  # fmt: skip
        return with_values(rows, self.out_proj(attended.flatten(1)))

    @torch.no_grad()
    def attention_weights(self, rows: JaggedTensor) -> tuple[Tensor, Tensor, Tensor]:
        """For pictures: `(query_P, key_P, weights [P, H])`, which position attends to which, and how much."""
        query, key, _ = self._projected(rows)
        query_P, key_P = attention_pairs(rows.offsets(), self.causal)
        logits_PH = (query[query_P] * key[key_P]).sum(-1) / query.size(-1) ** 0.5
        return query_P, key_P, softmax_of_queries(logits_PH, query_P, len(query))

    def _projected(self, rows: JaggedTensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each [N, H, D]."""
        return self.in_proj(rows.values()).unflatten(1, (3, self.num_heads, -1)).unbind(1)


class JaggedTransformerBlock(nn.Module):
    """Attention, then a two-layer network at every position, each on normalised input and added to what came in.

    Shapes: JaggedTensor with `[N, dim]` values in and out.
    """

    def __init__(
        self, dim: int, num_heads: int, causal: bool, dropout: float = 0.0, backend: str | None = None,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention_norm, self.network_norm = (nn.LayerNorm(dim, device=device) for _ in range(2))
        self.attention = JaggedSelfAttention(dim, num_heads, causal, dropout, backend, device)
        self.network = nn.Sequential(
            nn.Linear(dim, 4 * dim, device=device), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(4 * dim, dim, device=device),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows: JaggedTensor) -> JaggedTensor:
        attended = self.attention(with_values(rows, self.attention_norm(rows.values())))
        values_ND = rows.values() + self.dropout(attended.values())
        return with_values(rows, values_ND + self.dropout(self.network(self.network_norm(values_ND))))


def with_values(rows: JaggedTensor, values: Tensor) -> JaggedTensor:
    """Other values in rows of the same lengths."""
    return JaggedTensor(values, lengths=rows.lengths(), offsets=rows.offsets())


def _check(query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, offsets: Tensor, backend: str | None) -> None:
    shapes = {tuple(part.shape) for part in (query_NHD, key_NHD, value_NHD)}
    if len(shapes) != 1 or query_NHD.dim() != 3:
        raise ValueError(f"query, key and value must have one shape [positions, heads, columns], got {sorted(shapes)}")
    end = int(offsets[-1]) if offsets.numel() else -1  # host sync: offsets that do not fit would read foreign memory
    if end != len(query_NHD):
        raise ValueError(f"offsets end at {end}, but there are {len(query_NHD)} positions")
    if backend not in (None, "pytorch", "fbgemm", "pairs"):
        raise ValueError(f'backend={backend!r}: expected "pytorch", "fbgemm" or "pairs"')
    if backend == "fbgemm" and not use_fbgemm(query_NHD.device):
        raise ValueError('backend="fbgemm", but FBGEMM is not in use here: recsys_edu doctor says why')
