"""Fused kernels against TorchRec's FusedEmbeddingBagCollection: outputs, weights and optimizer state, step by step."""

from __future__ import annotations

import pytest
import torch

from recsys_edu.kernels import KernelSpec, OptimizerSpec, TableSpec, make_kernel
from recsys_edu.kernels.backend import fbgemm_status

pytest.importorskip("torchrec")

from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

TABLES = (TableSpec("t0", 10, 8), TableSpec("t1", 6, 4))
LANES = {"f": 0, "g": 0, "h": 1}  # features f and g share t0
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "ADAGRAD": (torch.optim.Adagrad, {"eps": 1e-8}),
    "ROWWISE_ADAGRAD": (RowWiseAdagrad, {"eps": 1e-8}),
}


def torchrec_collection(kind: str) -> FusedEmbeddingBagCollection:
    optimizer, arguments = OPTIMIZERS[kind]
    configs = [
        EmbeddingBagConfig(
            num_embeddings=table.num_rows,
            embedding_dim=table.dim,
            name=table.name,
            feature_names=[feature for feature, read in LANES.items() if read == index],
        )
        for index, table in enumerate(TABLES)
    ]
    return FusedEmbeddingBagCollection(
        tables=configs,
        optimizer_type=optimizer,
        optimizer_kwargs={"lr": 0.1, **arguments},
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["pytorch", "fbgemm"])
def test_fused_steps_equal_torchrecs(kind, backend):
    if backend == "fbgemm" and not fbgemm_status().available:
        pytest.skip(fbgemm_status().reason)
    torch.manual_seed(0)
    theirs = torchrec_collection(kind)
    spec = KernelSpec(TABLES, tuple(LANES.values()), True, optimizer=OptimizerSpec(kind, learning_rate=0.1))
    ours = make_kernel(spec, backend=backend)
    their_weights = {name.split(".")[-2]: weight for name, weight in theirs.state_dict().items()}
    for table, weights in zip(TABLES, ours.table_weights()):
        weights.copy_(their_weights[table.name])
    for _ in range(5):
        lengths = torch.randint(0, 4, (len(LANES), 6))
        rows = [TABLES[table].num_rows for table in LANES.values()]
        ids = torch.cat([torch.randint(n, (int(total),)) for n, total in zip(rows, lengths.sum(1))])
        kjt = KeyedJaggedTensor(keys=list(LANES), values=ids, lengths=lengths.flatten())
        theirs_BD = theirs(kjt).values()
        ours_BD = ours(ids, kjt.offsets())
        torch.testing.assert_close(ours_BD, theirs_BD)
        gradient_BD = torch.randn_like(ours_BD)
        theirs_BD.backward(gradient_BD)
        ours_BD.backward(gradient_BD)

    for table, weights in zip(TABLES, ours.table_weights()):
        torch.testing.assert_close(weights, their_weights[table.name], rtol=1e-5, atol=1e-6)
    their_state = theirs.fused_optimizer().state_dict()["state"]
    for table, state in zip(TABLES, ours.optimizer_state()):
        expected = their_state.get(f"{table.name}.weight", {})
        assert len(state) == len(expected)
        if expected:
            torch.testing.assert_close(state["momentum1"], expected[f"{table.name}.weight.momentum_1"])
