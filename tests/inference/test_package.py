"""Packages: the model's own answers, without this package's code, or a clear refusal."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from recsys_edu.distributed.planner import ParameterConstraints
from recsys_edu.distributed.types import ShardedModule
from recsys_edu.inference.archive import PackageError, load_quantized_state, save_quantized_state, verify
from recsys_edu.inference.modules import (
    quantize_dense,
    quantize_inference_model,
    set_index_remappings,
    shard_quant_model,
    unshard_quant_model,
)
from recsys_edu.inference.package import (
    compile_package,
    compiler_at_hand,
    export_package,
    load_package,
    read_metadata,
)
from recsys_edu.kernels.backend import fbgemm_status
from recsys_edu.kernels.quantized_remap import keep_largest_rows
from recsys_edu.models.dlrm import DLRM
from recsys_edu.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.sparse.jagged_tensor import KeyedJaggedTensor

FEATURES, ROWS = ["user", "friend", "film"], [50, 50, 30]
NO_FBGEMM = pytest.mark.skipif(not fbgemm_status().available, reason="no FBGEMM")
KERNELS = ["pytorch", pytest.param("fbgemm", marks=[pytest.mark.fbgemm, NO_FBGEMM])]


def float_model(seed: int = 0, dim: int = 8, weighted: bool = False) -> DLRM:
    torch.manual_seed(seed)
    tables = EmbeddingBagCollection(
        [
            EmbeddingBagConfig(50, dim, "people", feature_names=["user", "friend"]),
            EmbeddingBagConfig(30, dim, "film", feature_names=["film"], pooling=PoolingType.MEAN),
        ],
        is_weighted=weighted,
    )
    return DLRM(tables, 3, [16, dim], [16, 1])


def quantised(seed: int = 0, **options) -> nn.Module:
    return quantize_inference_model(float_model(seed), **options)


def request(lengths_FB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    values = [torch.randint(0, rows, (int(lengths.sum()),)) for rows, lengths in zip(ROWS, lengths_FB)]
    return torch.rand(lengths_FB.shape[1], 3), lengths_FB, values


def scores_of(model: nn.Module, dense_BI, lengths_FB, values, weights=None) -> torch.Tensor:
    weights_N = None if weights is None else torch.cat(weights)
    kjt = KeyedJaggedTensor(FEATURES, torch.cat(values), weights_N, lengths=lengths_FB.flatten())
    with torch.no_grad():
        return model(dense_BI, kjt).float().sigmoid().squeeze(-1)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("options", [{}, {"per_table_weight_dtype": {"film": torch.quint4x2, "people": torch.float16}}])
def test_answers_are_the_models(tmp_path: Path, kernels: str, options: dict) -> None:
    model = quantised(**options)
    metadata = export_package(model, tmp_path / "m.pt2", num_dense=3, kernels=kernels)
    assert (metadata.features, metadata.num_rows, metadata.kernels) == (FEATURES, ROWS, kernels)
    package = load_package(tmp_path / "m.pt2")
    for lengths_FB in (
        torch.tensor([[1], [0], [2]]),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
        torch.randint(0, 4, (3, 17)),
    ):
        batch = request(lengths_FB)
        torch.testing.assert_close(package.predict(*batch), scores_of(model, *batch))
    narrow = (batch[0].double(), batch[1].int(), [ids.int() for ids in batch[2]])
    torch.testing.assert_close(package.predict(*narrow), scores_of(model, *batch))
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]  # nothing is left aside


@pytest.mark.parametrize("kernels", KERNELS)
def test_pruned_tables_are_packed_with_their_renumbering(tmp_path: Path, kernels: str) -> None:
    model = float_model()
    weight = model.sparse_arch.embedding_bag_collection.embedding_bags["people"].weight
    set_index_remappings(model, {"people": keep_largest_rows(weight, 20).array()})
    model = quantize_inference_model(model)
    export_package(model, tmp_path / "m.pt2", num_dense=3, kernels=kernels)
    batch = request(torch.randint(0, 4, (3, 9)))
    torch.testing.assert_close(load_package(tmp_path / "m.pt2").predict(*batch), scores_of(model, *batch))


@pytest.mark.parametrize("kernels", KERNELS)
def test_weighted_models_take_a_weight_for_every_id(tmp_path: Path, kernels: str) -> None:
    model = quantize_inference_model(float_model(weighted=True))
    assert export_package(model, tmp_path / "m.pt2", num_dense=3, kernels=kernels).weighted
    package = load_package(tmp_path / "m.pt2")
    for lengths_FB in (torch.randint(0, 4, (3, 7)), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1).long()):
        batch = request(lengths_FB)
        weights = [torch.randn(ids.numel()) for ids in batch[2]]
        torch.testing.assert_close(package.predict(*batch, weights), scores_of(model, *batch, weights))
    with pytest.raises(ValueError, match="takes a weight for every id"):
        package.predict(*batch)
    with pytest.raises(ValueError, match="'friend' has 1 ids and 2 weights"):
        package.predict(*batch, [weights[0], torch.ones(2), weights[2]])
    plain = tmp_path / "plain.pt2"
    export_package(quantised(), plain, num_dense=3, kernels=kernels)
    with pytest.raises(ValueError, match="does not take a weight"):
        load_package(plain).predict(*batch, weights)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", ["plain", "weighted", "pruned"])
@pytest.mark.parametrize("kind", ["row_wise", "column_wise", "table_wise"])
def test_sharded_models_are_packed_as_the_equal_unsharded_one(
    tmp_path: Path, kernels: str, case: str, kind: str
) -> None:
    model = float_model(weighted=case == "weighted")
    if case == "pruned":
        weight = model.sparse_arch.embedding_bag_collection.embedding_bags["people"].weight
        set_index_remappings(model, {"people": keep_largest_rows(weight, 20).array()})
    per_table = {"film": torch.quint4x2}
    model = quantize_inference_model(model, per_table_weight_dtype=per_table)
    constraints = {name: ParameterConstraints(sharding_types=[kind], min_partition=4) for name in ("people", "film")}
    sharded, plan = shard_quant_model(copy.deepcopy(model), 2, "cpu", constraints=constraints)
    found = plan.plan["sparse_arch.embedding_bag_collection"]
    assert {each.sharding_type for each in found.values()} == {kind}
    export_package(sharded, tmp_path / "m.pt2", num_dense=3, kernels=kernels)
    package = load_package(tmp_path / "m.pt2")
    batch = request(torch.randint(0, 4, (3, 9)))
    rest = [[torch.rand(ids.numel()) for ids in batch[2]]] if case == "weighted" else []
    torch.testing.assert_close(package.predict(*batch, *rest), scores_of(sharded, *batch, *rest))
    whole = unshard_quant_model(sharded)
    assert isinstance(sharded.sparse_arch.embedding_bag_collection, ShardedModule)  # it stayed as it was
    assert torch.equal(scores_of(whole, *batch, *rest), scores_of(model, *batch, *rest))
    for name, saved in whole.state_dict().items():
        assert torch.equal(saved, model.state_dict()[name]), name


def test_a_dense_part_in_int8_or_half_precision_is_packed(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        if dtype is torch.int8 and importlib.util.find_spec("torchao") is None:
            continue  # test_modules.py says what is missing
        tables = torch.float32 if dtype is torch.int8 else dtype
        model = quantize_dense(quantised(output_dtype=tables), dtype).eval()
        if dtype is not torch.int8:
            model.register_forward_pre_hook(lambda _, given, dtype=dtype: (given[0].to(dtype), *given[1:]))
        export_package(model, tmp_path / "m.pt2", num_dense=3)
        batch = request(torch.randint(0, 4, (3, 9)))
        found = load_package(tmp_path / "m.pt2").predict(*batch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, scores_of(model, *batch), rtol=0, atol=2e-3)
        torch.testing.assert_close(found, scores_of(quantised(), *batch), rtol=0, atol=2e-2)


PLAIN_TORCH = """
import sys, torch
if sys.argv[3] == "fbgemm":
    import fbgemm_gpu
kind = sys.argv[4]
batch = torch.load(sys.argv[2], weights_only=True)
if kind == "compiled":
    from torch._inductor import aoti_load_package
    program = aoti_load_package(sys.argv[1])
else:
    program = torch.export.load(sys.argv[1]).module()
with torch.no_grad():
    scores = program(batch["dense"], batch["lengths"], batch["values"])
torch.testing.assert_close(scores, batch["scores"])
strange = [ids.clone() for ids in batch["values"]]
strange[0][0] = 10**9
assert program(batch["dense"], batch["lengths"], strange).isfinite().all()
assert not any(name.split(".")[0] == "recsys_edu" for name in sys.modules)
print("equal")
"""


def predict_with_plain_torch(folder: Path, model: nn.Module, file: str, kernels: str, kind: str) -> str:
    """Try a package in a process that never imports this package."""
    dense_BI, lengths_FB, values = batch = request(torch.randint(1, 4, (3, 6)))
    contents = {"dense": dense_BI, "lengths": lengths_FB, "values": values, "scores": scores_of(model, *batch)}
    torch.save(contents, folder / "batch.pt")
    # -P: no folder of the checkout on the path, so an import of this package could not go unnoticed
    command = [sys.executable, "-P", "-c", PLAIN_TORCH, str(folder / file), str(folder / "batch.pt"), kernels, kind]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("kernels", KERNELS)
def test_torch_alone_predicts(tmp_path: Path, kernels: str) -> None:
    model = quantised()
    export_package(model, tmp_path / "m.pt2", num_dense=3, kernels=kernels)
    assert predict_with_plain_torch(tmp_path, model, "m.pt2", kernels, "exported") == "equal"


@pytest.mark.skipif(compiler_at_hand() is None, reason="no C++ compiler")
def test_machine_code_predicts(tmp_path: Path) -> None:
    model = quantised()
    export_package(model, tmp_path / "m.pt2", num_dense=3, kernels="pytorch")
    assert compile_package(tmp_path / "m.pt2", tmp_path / "c.pt2").kind == "compiled"
    package = load_package(tmp_path / "c.pt2")
    for size in (0, 1, 40):
        batch = request(torch.randint(0, 4, (3, size)))
        torch.testing.assert_close(package.predict(*batch), scores_of(model, *batch), rtol=1e-4, atol=1e-5)
    assert predict_with_plain_torch(tmp_path, model, "c.pt2", "pytorch", "compiled") == "equal"
    with pytest.raises(PackageError, match="compiled already"):
        compile_package(tmp_path / "c.pt2", tmp_path / "d.pt2")


def test_without_a_compiler_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_package(quantised(), tmp_path / "m.pt2", num_dense=3, kernels="pytorch")
    monkeypatch.setattr("recsys_edu.inference.package.compiler_at_hand", lambda: None)
    with pytest.raises(RuntimeError, match=r"install g\+\+ or clang, or serve .*m.pt2 as it is"):
        compile_package(tmp_path / "m.pt2", tmp_path / "c.pt2")
    assert not (tmp_path / "c.pt2").exists()


def test_predict_refuses_what_does_not_fit(tmp_path: Path) -> None:
    export_package(quantised(), tmp_path / "m.pt2", num_dense=3, kernels="pytorch")
    package = load_package(tmp_path / "m.pt2")
    dense_BI, lengths_FB, values = request(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"'film': id 30 is outside 0 \.\.\. 29"):
        package.predict(dense_BI, lengths_FB, [values[0], values[1], torch.tensor([0, 30])])
    with pytest.raises(ValueError, match="'user' has 3 ids, its lengths add up to 2"):
        package.predict(dense_BI, lengths_FB, [torch.tensor([0, 1, 2]), *values[1:]])
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        package.predict(torch.rand(2, 4), lengths_FB, values)
    with pytest.raises(ValueError, match="negative"):
        package.predict(dense_BI, torch.tensor([[3, -1], [1, 1], [1, 1]]), values)


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with pytest.raises(ValueError, match="not quantised"):
        export_package(float_model(), path, num_dense=3)
    with pytest.raises(ValueError, match="no quantised embedding"):
        export_package(nn.Linear(2, 1), path, num_dense=2)
    with pytest.raises(ValueError, match="score is one of"):
        export_package(quantised(), path, num_dense=3, score="percent")
    with pytest.raises(ValueError, match="kernels are"):
        export_package(quantised(), path, num_dense=3, kernels="cuda")
    assert list(tmp_path.iterdir()) == []


class Sequences(nn.Module):
    """The mean of a user's films, scored: a model without dense inputs, with sequence embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.ec = EmbeddingCollection([EmbeddingConfig(30, 8, "film", feature_names=["film"])])
        self.over = nn.Linear(8, 1)

    def forward(self, kjt: KeyedJaggedTensor) -> torch.Tensor:
        films = self.ec(kjt)["film"]
        sums_BD = torch.segment_reduce(films.values(), "sum", lengths=films.lengths(), unsafe=True)
        return self.over(sums_BD)


@pytest.mark.parametrize("case", ["plain", "pruned", "sharded"])
def test_a_sequence_model_without_dense_inputs(tmp_path: Path, case: str) -> None:
    model = Sequences()
    if case == "pruned":
        set_index_remappings(model, {"film": keep_largest_rows(model.ec.embeddings["film"].weight, 20).array()})
    model = quantize_inference_model(model)
    if case == "sharded":
        model, _ = shard_quant_model(model, 2, "cpu")
    export_package(model, tmp_path / "m.pt2", num_dense=0, score="raw")
    values, lengths = torch.randint(0, 30, (6,)), torch.tensor([2, 1, 3])
    package = load_package(tmp_path / "m.pt2")
    found = package.predict(torch.empty(3, 0), lengths.unsqueeze(0), [values])
    with torch.no_grad():
        expected = model(KeyedJaggedTensor(["film"], values, lengths=lengths)).squeeze(-1)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():  # a program by itself finds zeros where no id is
        strange = package.program(torch.empty(1, 0), torch.tensor([[1]]), [torch.tensor([10**9])])
    torch.testing.assert_close(strange, model.over.bias)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("package") / "m.pt2"
    export_package(quantised(), path, num_dense=3, kernels="pytorch")
    return path.read_bytes()


@pytest.mark.parametrize("place", [0.0, 0.02, 0.2, 0.5, 0.8, 0.97])
def test_one_flipped_byte_is_found(tmp_path: Path, written: bytes, place: float) -> None:
    damaged = bytearray(written)
    # Bytes between entries are padding and mean nothing; a changed package must never load with other weights.
    damaged[int(place * len(written))] ^= 0x40
    (tmp_path / "m.pt2").write_bytes(damaged)
    try:
        read_metadata(tmp_path / "m.pt2")
    except PackageError as error:
        assert "m.pt2" in str(error)
    else:
        (tmp_path / "good.pt2").write_bytes(written)
        batch = request(torch.ones(3, 4, dtype=torch.int64))
        good, other = load_package(tmp_path / "good.pt2"), load_package(tmp_path / "m.pt2")
        assert torch.equal(good.predict(*batch), other.predict(*batch))


def test_half_a_file_and_foreign_files(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "m.pt2"
    with pytest.raises(FileNotFoundError, match=r"m\.pt2"):
        load_package(path)
    path.write_bytes(written[: len(written) // 2])
    with pytest.raises(PackageError, match="damaged"):
        load_package(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(PackageError, match="not written by recsys_edu"):
        load_package(path)


def rewritten(path: Path, content: bytes, change) -> None:
    """The archive with some entries changed and no checksum renewed."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)


def test_an_entry_that_is_missing_foreign_or_changed_is_named(tmp_path: Path, written: bytes) -> None:
    path = tmp_path / "m.pt2"
    rewritten(path, written, lambda entries: {k: v for k, v in entries.items() if not k.endswith("weight_0")})
    with pytest.raises(PackageError, match="weight_0 is missing"):
        verify(path)
    rewritten(path, written, lambda entries: entries | {"m/more": b"!"})
    with pytest.raises(PackageError, match="m/more is not its own"):
        verify(path)
    rewritten(path, written, lambda entries: {k: v[::-1] if k.endswith("weight_0") else v for k, v in entries.items()})
    with pytest.raises(PackageError, match="weight_0 has changed"):
        verify(path)


def test_a_package_of_pickles_is_refused(tmp_path: Path) -> None:
    export_package(quantised(), tmp_path / "m.pt2", num_dense=3, kernels="pytorch")
    content = (tmp_path / "m.pt2").read_bytes()

    def with_pickle(entries: dict[str, bytes]) -> dict[str, bytes]:
        from hashlib import sha256

        name = next(name for name in entries if name.endswith("model_weights_config.json"))
        entries[name] = entries[name].replace(b'"use_pickle": false', b'"use_pickle": true')
        sums = next(name for name in entries if name.endswith("checksums.json"))
        entries[sums] = json.dumps(json.loads(entries[sums]) | {name: sha256(entries[name]).hexdigest()}).encode()
        return entries

    rewritten(tmp_path / "m.pt2", content, with_pickle)
    with pytest.raises(PackageError, match="pickle"):
        load_package(tmp_path / "m.pt2")


def test_a_package_that_answers_otherwise_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_package(quantised(), tmp_path / "m.pt2", num_dense=3, kernels="pytorch")
    monkeypatch.setattr("recsys_edu.inference.package.Package.predict", lambda self, *batch: torch.zeros(3))
    with pytest.raises(PackageError, match="do not serve it"):
        load_package(tmp_path / "m.pt2")


def test_state_goes_from_unsharded_to_sharded_and_back(tmp_path: Path) -> None:
    model, other = quantised(0), quantised(1)
    save_quantized_state(model, tmp_path / "state.pt")
    sharded, _ = shard_quant_model(other, 2, "cpu")
    batch = request(torch.randint(0, 4, (3, 5)))
    assert not torch.equal(scores_of(sharded, *batch), scores_of(model, *batch))
    load_quantized_state(sharded, tmp_path / "state.pt")
    torch.testing.assert_close(scores_of(sharded, *batch), scores_of(model, *batch))
    save_quantized_state(sharded, tmp_path / "back.pt")
    back = quantised(2)
    load_quantized_state(back, tmp_path / "back.pt")
    assert torch.equal(scores_of(back, *batch), scores_of(model, *batch))


def test_a_state_of_another_model_changes_nothing(tmp_path: Path) -> None:
    save_quantized_state(quantize_inference_model(Sequences()), tmp_path / "state.pt")
    model = quantised()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PackageError, match="of another model"):
        load_quantized_state(model, tmp_path / "state.pt")
    with pytest.raises(PackageError, match="not a packaged model"):
        load_package(tmp_path / "state.pt")
    damaged = bytearray((tmp_path / "state.pt").read_bytes())
    damaged[len(damaged) // 3] ^= 1
    (tmp_path / "state.pt").write_bytes(damaged)
    with pytest.raises(PackageError, match="damaged"):
        load_quantized_state(model, tmp_path / "state.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
