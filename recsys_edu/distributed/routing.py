"""Input routing: which ids go to which rank, as one pure function from a batch to a wire.

    kjt  --bucketise by row-->  row blocks  --permute into lane order-->  Wire

Every sharding type is these two steps: a table with whole rows is the one-bucket case, a column-wise table
names the same bucket once per column block, a table-wise one names it once.

Suffixes: B local batch, F features of the batch, S row-split outputs, K row blocks, L lanes, N values, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recsys_edu.distributed.layout import Layout
from recsys_edu.kernels.backend import use_fbgemm
from recsys_edu.kernels.jagged_ops import complete_cumsum, permute_2d
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Wire:
    """A batch re-expressed lane by lane: what this rank sends, contiguous per destination rank.

    lengths_LB        how many ids each bag has in each lane
    values_N          row numbers, counted from the first row of the lane's shard
    source_N          for every value its index in the batch's values (only if asked for)
    """

    lengths_LB: Tensor
    values_N: Tensor
    source_N: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.lengths_LB.shape[1]


class Router:
    """The constants of routing for one layout and one order of keys; `route` is its only verb.

    Args:
        layout: the module's lanes.
        keys: the batch's keys, in the order in which its values lie.
        device: where the batches are.

    Raises:
        KeyError: a feature of the layout is not among the keys.
    """

    def __init__(self, layout: Layout, keys: list[str], device: torch.device) -> None:
        missing = [feature for feature in layout.features if feature not in keys]
        if missing:
            raise KeyError(
                f"features {missing} are fed to tables of this module, but the batch has only {list(keys)}: "
                "add them to the KeyedJaggedTensor or take them off the tables"
            )
        position = {key: index for index, key in enumerate(keys)}
        split = [output for output in layout.outputs if output.table.num_row_blocks > 1]
        whole_F = len(keys) if len(split) < len(layout.outputs) else 0
        split_index = {id(output): index for index, output in enumerate(split)}
        rows = [
            position[lane.output.feature]
            if lane.output.table.num_row_blocks == 1
            else whole_F + lane.row_block * len(split) + split_index[id(lane.output)]
            for lane in layout.lanes
        ]
        self.uses_whole_rows = whole_F > 0
        self.is_identity = not split and rows == list(range(len(keys)))
        self.lane_row_L = torch.tensor(rows, dtype=torch.int32, device=device)
        self.split_row_S = torch.tensor([position[o.feature] for o in split], dtype=torch.int32, device=device)
        self.row_cuts_SK = _padded_cuts([output.table.row_cuts for output in split], device)
        # Row-wise tables of all features, each on all ranks, lie in order from the start: then nothing is copied.
        self.splits_all_in_order = self.split_row_S.tolist() == list(range(len(keys)))
        num_rows = whole_F + (self.row_cuts_SK.shape[1] - 1) * len(split)
        self.lanes_in_order = rows == list(range(num_rows))

    def route(self, kjt: KeyedJaggedTensor, with_source: bool = False) -> Wire:
        """Lay out the batch for its lanes.

        Args:
            kjt: keys as given to the constructor, ids already checked.
            with_source: also say where each wire value came from (sequences and weights need it).
        """
        lengths_FB = kjt.lengths().view(len(kjt.keys()), kjt.stride())
        values_N = kjt.values()
        source_N = torch.arange(values_N.numel(), device=values_N.device) if with_source else None
        if self.is_identity:
            return Wire(lengths_FB, values_N, source_N)
        # FBGEMM's permutation carries one payload of integers; the source positions ride in a second pass.
        lengths, values, sources = [], [], []
        if self.uses_whole_rows:
            lengths.append(lengths_FB)
            values.append(values_N)
            sources.append(source_N)
        if len(self.split_row_S):
            split_lengths_SB, split_values = lengths_FB, values_N
            if not self.splits_all_in_order:
                split_lengths_SB, split_values, _ = permute_2d(self.split_row_S, lengths_FB, values_N)
            block_lengths, block_values, order = bucketize(
                split_lengths_SB, split_values, self.row_cuts_SK, with_order=with_source
            )
            lengths.append(block_lengths)
            values.append(block_values)
            if with_source:
                _, split_source, _ = permute_2d(self.split_row_S, lengths_FB, source_N)
                sources.append(split_source[order])
        all_lengths, all_values = _cat(lengths), _cat(values)
        if self.lanes_in_order:
            return Wire(all_lengths, all_values, _cat(sources) if with_source else None)
        lengths_LB, wire_values, _ = permute_2d(self.lane_row_L, all_lengths, all_values)
        if with_source:
            _, source_N, _ = permute_2d(self.lane_row_L, all_lengths, _cat(sources))
        return Wire(lengths_LB, wire_values, source_N)


def bucketize(
    lengths_SB: Tensor, values_N: Tensor, row_cuts_SK: Tensor, with_order: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Split every row's ids into blocks of rows and count them from their block's first row.

    Two blocks cut at row 3, one feature, bags [0, 4] and [3]:

        lengths [[2, 1]], values [0, 4, 3]  ->  lengths [[1, 0],    values [0,
                                                          [1, 1]]            1, 0]

    Args:
        lengths_SB: bag lengths per row-split output.
        values_N: ids.
        row_cuts_SK: K + 1 row cuts per output, the first 0; unused ones repeat the table's number of rows.

    Returns:
        lengths [K * S, B] block-major, block-local values [N], and for each of those its index in `values_N` (None
        where it was not asked for).
    """
    if not use_fbgemm(values_N.device):
        return bucketize_reference(lengths_SB, values_N, row_cuts_SK)
    cuts_SK = row_cuts_SK.to(values_N.dtype)
    # The cuts alone decide. FBGEMM still wants a block size per feature, contiguous: it ignores strides.
    lengths, values, _, _, position_N = torch.ops.fbgemm.block_bucketize_sparse_features(
        lengths_SB.flatten(),
        values_N,
        False,
        with_order,
        cuts_SK[:, 1].contiguous(),
        cuts_SK.shape[1] - 1,
        block_bucketize_pos=list(cuts_SK.unbind()),
    )
    order_N = None
    if with_order:
        order_N = torch.empty_like(position_N)
        order_N[position_N] = torch.arange(position_N.numel(), dtype=position_N.dtype, device=position_N.device)
    num_blocks = cuts_SK.shape[1] - 1
    return lengths.view(num_blocks * lengths_SB.shape[0], lengths_SB.shape[1]), values, order_N


def bucketize_reference(lengths_SB: Tensor, values_N: Tensor, row_cuts_SK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`bucketize` in plain PyTorch: number every value by (block, output, bag) and sort by that number."""
    num_outputs, batch_size = lengths_SB.shape
    num_blocks = row_cuts_SK.shape[1] - 1
    bags = torch.arange(num_outputs * batch_size, device=values_N.device)
    bag_N = torch.repeat_interleave(bags, lengths_SB.flatten())
    output_N = bag_N // max(batch_size, 1)
    block_N = (values_N[:, None] >= row_cuts_SK[output_N, 1:-1]).sum(1)
    local_N = values_N - row_cuts_SK[output_N, block_N].to(values_N.dtype)
    slot_N = block_N * num_outputs * batch_size + bag_N
    order_N = torch.argsort(slot_N, stable=True)
    lengths = torch.bincount(slot_N, minlength=num_blocks * num_outputs * batch_size).to(lengths_SB.dtype)
    return lengths.view(num_blocks * num_outputs, batch_size), local_N[order_N], order_N


def pad_to_common_batch(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """A batch whose features differ in batch size, as one of a common size: short features get empty bags.

    The values stay as they are; only lengths are added, so every later step sees an ordinary batch.
    """
    strides_F = kjt.stride_per_key()
    batch_size = max(strides_F, default=0)
    rows = kjt.lengths().split(strides_F)
    padded = [torch.nn.functional.pad(row, (0, batch_size - row.numel())) for row in rows]
    lengths = torch.cat(padded) if padded else kjt.lengths()
    return KeyedJaggedTensor(kjt.keys(), kjt.values(), kjt.weights_or_none(), lengths=lengths, stride=batch_size)


def offsets_of(lengths: Tensor) -> Tensor:
    """Prefix sums of flattened lengths, with a leading zero."""
    return complete_cumsum(lengths.flatten())


def _padded_cuts(cuts: list[tuple[int, ...]], device: torch.device) -> Tensor:
    longest = max((len(row) for row in cuts), default=1)
    padded = [[*row, *[row[-1]] * (longest - len(row))] for row in cuts]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(len(cuts), longest)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
