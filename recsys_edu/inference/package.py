"""A model as one file that predicts without this package: torch.export's graph, and machine code of it where a
compiler is at hand.

    model = quantize_inference_model(dlrm)
    export_package(model, "film.pt2", num_dense=3)                  # a graph: torch alone runs it
    compile_package("film.pt2", "film.compiled.pt2")                # machine code, by AOTInductor (needs g++ or clang)

    package = load_package("film.pt2")                              # here, with checks of ids
    package.predict(dense_BI, lengths_FB, [values_N, ...])          # -> scores [B]

    program = torch.export.load("film.pt2").module()                # anywhere, with torch alone
    program(dense_BI, lengths_FB, [values_N, ...])                  # int64; "fbgemm": import fbgemm_gpu first

Models with weighted collections take a fourth argument, [weights_N, ...], one float32 for every id. A model that is
sharded over devices is put together first, for a package has one device. In the graph (traced.py) an id outside its
table finds zeros; `Package.predict` and the server refuse such ids by name before they get there.

Shapes: B batch, F features, I dense inputs, N values of one feature.
Source: torch.export, AOTInductor; for tables torchrec.inference's state dicts.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from recsys_edu.distributed.types import ShardedModule
from recsys_edu.inference.archive import ARCHIVE_FORMAT, PackageError, seal, verify, written_aside
from recsys_edu.inference.modules import PredictModule, unshard_quant_model
from recsys_edu.inference.traced import Served, in_plain_tensors, with_lookups
from recsys_edu.modules.embedding_modules import EmbeddingBagCollection as FloatEmbeddingBagCollection
from recsys_edu.modules.embedding_modules import EmbeddingCollection as FloatEmbeddingCollection
from recsys_edu.quant.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from recsys_edu.types import DataType

SCORES = ("probability", "raw")
TRIAL_BATCH, TRIAL_IDS = 3, 2
TOLERANCE = 1e-4
"""How far a loaded package may be from the scores recorded when it was made: another processor rounds otherwise."""


@dataclass(frozen=True)
class Trial:
    """One request and its scores, recorded when a package was made and tried again when it is loaded."""

    dense: list[list[float]]
    lengths: list[list[int]]
    values: list[list[int]]
    scores: list[float]
    weights: list[list[float]] | None = None


@dataclass(frozen=True)
class PackageMetadata:
    """What a server has to know about a packaged model.

    Args:
        kind: "exported" (a graph) or "compiled" (machine code).
        features: the F sparse features, in the order of a request's lengths and values.
        num_rows: for each of them the ids that are known, 0 to num_rows - 1.
        num_dense: I; 0 for a model without dense inputs.
        score: "probability" (behind a sigmoid) or "raw".
        kernels: "fbgemm" (its operators have to be loaded) or "pytorch".
        device: where its weights are.
        weighted: every id comes with a weight.
    """

    kind: str
    features: list[str]
    num_rows: list[int]
    num_dense: int
    score: str
    kernels: str
    device: str
    torch: str
    trial: Trial
    weighted: bool = False
    format: int = ARCHIVE_FORMAT


def export_package(
    model: nn.Module,
    path: str | Path,
    num_dense: int,
    score: str = "probability",
    kernels: str | None = None,
) -> PackageMetadata:
    """Write a quantised model as a graph that torch alone can run.

    Args:
        model: quantised, called as `model(dense, kjt)`, or `model(kjt)` where num_dense is 0; or a PredictModule
            around one. It answers [B, 1] or [B] logits. It is put into eval mode. If it is sharded, the package holds
            the equal unsharded one, on the device of batches and answers.
        path: the file, `.pt2` by custom and because torch asks for it.
        num_dense: I.
        score: "probability" puts a sigmoid behind the model, "raw" does not.
        kernels: "pytorch", for machines without FBGEMM; "fbgemm"; None takes what the model itself uses.

    Raises:
        ValueError: nothing quantised in the model, float tables; an unknown argument.

    The file is replaced as a whole, and only after the graph has given the model's own answers.
    """
    path, model = Path(path), model.predict_module if isinstance(model, PredictModule) else model
    if score not in SCORES:
        raise ValueError(f"score is one of {', '.join(SCORES)}, got {score!r}")
    whole = unshard_quant_model(model.eval())
    tables = _exportable(whole)
    kernels = _choose_kernels(tables, kernels)
    features, num_rows = _features_of(tables)
    weighted = any(isinstance(child, EmbeddingBagCollection) and child.is_weighted() for child in tables)
    served = Served(in_plain_tensors(with_lookups(whole, kernels)), features, num_dense, score).eval()
    device = tables[0].device
    request = _random_request(num_rows, num_dense, weighted, device)
    with torch.no_grad():
        program = torch.export.export(served, request, dynamic_shapes=_dynamic_shapes(len(features), weighted))
        scores = program.module()(*request)
        expected = Served(model, features, num_dense, score)(*request)
    if not torch.allclose(scores, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise RuntimeError(f"the graph answers {scores.tolist()}, the model {expected.tolist()}: nothing was written")
    metadata = PackageMetadata(
        kind="exported",
        features=features,
        num_rows=num_rows,
        num_dense=num_dense,
        score=score,
        kernels=kernels,
        device=str(device),
        torch=torch.__version__,
        trial=_recorded(request, scores),
        weighted=weighted,
    )
    with written_aside(path) as aside:
        torch.export.save(program, aside)
        seal(aside, asdict(metadata))
    return metadata


def _exportable(model: nn.Module) -> list[EmbeddingBagCollection | EmbeddingCollection]:
    """The model's quantised collections, once it is sure that there is nothing else."""
    for name, child in model.named_modules():
        if isinstance(child, ShardedModule):  # quantised ones were put together before
            raise ValueError(f"{name!r} is sharded and not quantised: gather it, then call quantize_inference_model")
        if isinstance(child, (FloatEmbeddingBagCollection, FloatEmbeddingCollection)):
            raise ValueError(f"{name!r} is not quantised: call quantize_inference_model first")
    kinds = (EmbeddingBagCollection, EmbeddingCollection)
    tables = [child for child in model.modules() if isinstance(child, kinds)]
    if not tables:
        raise ValueError("the model has no quantised embedding collection: call quantize_inference_model first")
    return tables


def _choose_kernels(tables: Sequence[EmbeddingBagCollection | EmbeddingCollection], kernels: str | None) -> str:
    if kernels not in (None, "pytorch", "fbgemm"):
        raise ValueError(f"kernels are None, 'pytorch' or 'fbgemm', got {kernels!r}")
    # FBGEMM's NFP8 lookup stops at an id of -1, and an exported graph cannot look for one beforehand
    usable = [
        child.kernel.backend == "fbgemm" and DataType.NFP8 not in child.kernel.spec.data_types
        for child in tables
        if isinstance(child, EmbeddingBagCollection)
    ]
    possible = bool(usable) and all(usable)
    if kernels == "fbgemm" and not possible:
        raise ValueError("kernels='fbgemm', but the model's tables are looked up in PyTorch here, or are NFP8")
    return kernels or ("fbgemm" if possible else "pytorch")


def _features_of(tables: Sequence[EmbeddingBagCollection | EmbeddingCollection]) -> tuple[list[str], list[int]]:
    """Every feature once, and how many ids all of its tables know."""
    rows: dict[str, int] = {}
    for child in tables:
        for feature, known in zip(child._lanes.features, child._lanes.num_rows):
            rows[feature] = min(known, rows.get(feature, known))
    return list(rows), list(rows.values())


def _dynamic_shapes(num_features: int, weighted: bool) -> dict[str, object]:
    """What may differ from request to request: the batch size, and each feature's number of ids."""
    batch = torch.export.Dim("batch")
    counts = [{0: torch.export.Dim(f"values_{place}")} for place in range(num_features)]
    shapes = {"dense_BI": {0: batch}, "lengths_FB": {1: batch}, "values": counts}
    return shapes | {"weights": list(counts)} if weighted else shapes


def _random_request(
    num_rows: Sequence[int], num_dense: int, weighted: bool, device: torch.device
) -> tuple[Tensor, Tensor, list[Tensor]] | tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dense_BI = torch.rand(TRIAL_BATCH, num_dense, generator=generator)
    lengths_FB = torch.full((len(num_rows), TRIAL_BATCH), TRIAL_IDS)
    # One value more per feature: torch.export would take sizes that agree for one and the same
    lengths_FB[:, 0] += torch.arange(len(num_rows))
    values = [
        torch.randint(0, rows, (int(lengths.sum()),), generator=generator)
        for rows, lengths in zip(num_rows, lengths_FB)
    ]
    request = (dense_BI.to(device), lengths_FB.to(device), [ids.to(device) for ids in values])
    if not weighted:
        return request
    return *request, [torch.rand(ids.numel(), generator=generator).to(device) for ids in values]


def _recorded(request: tuple[Tensor, Tensor, list[Tensor], *tuple[list[Tensor], ...]], scores: Tensor) -> Trial:
    dense_BI, lengths_FB, values, *rest = request
    weights = [each.tolist() for each in rest[0]] if rest else None
    return Trial(dense_BI.tolist(), lengths_FB.tolist(), [ids.tolist() for ids in values], scores.tolist(), weights)


def compiler_at_hand() -> str | None:
    """The C++ compiler that AOTInductor would call; None where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return shutil.which(get_cpp_compiler())
    except Exception:  # torch has its own exception for "no working compiler", and it moved
        return None


def compile_package(path: str | Path, compiled_path: str | Path) -> PackageMetadata:
    """Turn an exported package into machine code for this kind of machine, through AOTInductor.

    A minute or so for a DLRM. The result holds a shared library: it runs on the same operating system and processor
    family, and loading it runs its code.

    Raises:
        FileNotFoundError, PackageError: as load_package.
        RuntimeError: no C++ compiler; the exported package serves without one.
    """
    path, compiled_path = Path(path), Path(compiled_path)
    metadata = read_metadata(path)
    if metadata.kind != "exported":
        raise PackageError(f"{path} is {metadata.kind} already: give the exported package")
    if compiler_at_hand() is None:
        raise RuntimeError(
            f"AOTInductor needs a C++ compiler and none was found: install g++ or clang, or serve {path} as it is"
        )
    _load_operators(metadata, path)
    from torch._inductor import aoti_compile_and_package

    program = torch.export.load(path)
    with written_aside(compiled_path) as aside:
        aoti_compile_and_package(program, package_path=str(aside))
        compiled = PackageMetadata(**{**asdict(metadata), "kind": "compiled", "trial": metadata.trial})
        seal(aside, asdict(compiled))
    return compiled


def read_metadata(path: str | Path) -> PackageMetadata:
    """What a package says about itself, once its checksums are found right; nothing in it is run.

    Raises:
        FileNotFoundError, PackageError: no such file; damage; another kind of file; a package with pickles.
    """
    path = Path(path)
    stored = verify(path)
    if stored.get("kind") not in ("exported", "compiled"):
        raise PackageError(f"{path} holds a {stored.get('kind')}, not a packaged model")
    if stored.get("format") != ARCHIVE_FORMAT:
        raise PackageError(f"{path} has format {stored.get('format')}, this version reads {ARCHIVE_FORMAT}")
    _refuse_pickles(path)
    return PackageMetadata(**{**stored, "trial": Trial(**stored["trial"])})


def _refuse_pickles(path: Path) -> None:
    """torch.export can store odd tensors as pickles, and unpickling runs whatever they say; ours have none."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("_config.json") and '"use_pickle": true' in archive.read(name).decode():
                raise PackageError(f"{path}: {name} asks for a pickle to be loaded, which packages of ours never do")


@dataclass(frozen=True)
class Package:
    """A loaded package: `predict` checks a batch and scores it."""

    metadata: PackageMetadata
    program: Callable[..., Tensor]

    def predict(
        self,
        dense_BI: Tensor,
        lengths_FB: Tensor,
        values: Sequence[Tensor],
        weights: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Scores [B].

        Args:
            dense_BI: float32, [B, 0] for a model without dense inputs.
            lengths_FB: int64 or int32, how many ids each example has of each feature.
            values: per feature its ids, int64 or int32, example after example.
            weights: per feature one float for each id, for a model that is weighted, and only for one.

        Raises:
            ValueError: shapes that do not fit each other or the model; weights missing or too many.
            IndexError: an id outside its feature's tables, by name.
        """
        known, batch_size = self.metadata, dense_BI.shape[0]
        shapes = (tuple(dense_BI.shape), tuple(lengths_FB.shape), len(values))
        wanted = ((batch_size, known.num_dense), (len(known.features), batch_size), len(known.features))
        if shapes != wanted:
            raise ValueError(f"dense, lengths and number of values are {shapes}, expected {wanted}")
        totals = lengths_FB.sum(1).tolist()  # host sync: a wrong length would read what is not there
        for name, ids, total in zip(known.features, values, totals):
            if ids.numel() != total:
                raise ValueError(f"feature {name!r} has {ids.numel()} ids, its lengths add up to {total}")
        self._check_ids(values, totals)
        if bool((lengths_FB < 0).any()):  # host sync
            raise ValueError("a length is negative")
        self._check_weights(values, weights)
        if batch_size == 0:  # machine code of AOTInductor does not expect this
            return dense_BI.new_zeros(0)
        with torch.inference_mode():
            request = (dense_BI.float(), lengths_FB.long(), [ids.long() for ids in values])  # what graphs expect
            return self.program(*request, [each.float() for each in weights]) if weights else self.program(*request)

    def _check_ids(self, values: Sequence[Tensor], totals: Sequence[int]) -> None:
        """One comparison over all features: 26 of them would cost a lone request a tenth of its time."""
        ids_N, device = torch.cat(list(values)), values[0].device
        rows_N = torch.tensor(self.metadata.num_rows, device=device).repeat_interleave(
            torch.tensor(totals, device=device), output_size=ids_N.numel()
        )
        if not bool(((ids_N < 0) | (ids_N >= rows_N)).any()):  # host sync: a bad id stops here
            return
        for name, rows, ids in zip(self.metadata.features, self.metadata.num_rows, values):
            bad = ids[(ids < 0) | (ids >= rows)]
            if bad.numel():
                raise IndexError(f"feature {name!r}: id {int(bad[0])} is outside 0 ... {rows - 1}")

    def _check_weights(self, values: Sequence[Tensor], weights: Sequence[Tensor] | None) -> None:
        if self.metadata.weighted != (weights is not None):
            does = "takes" if self.metadata.weighted else "does not take"
            raise ValueError(f"the packaged model {does} a weight for every id")
        for name, ids, own in zip(self.metadata.features, values, weights or (), strict=weights is not None):
            if own.shape != ids.shape:
                raise ValueError(f"feature {name!r} has {ids.numel()} ids and {own.numel()} weights")


def load_package(path: str | Path) -> Package:
    """Read a package, exported or compiled, and try it on its recorded request.

    Raises:
        FileNotFoundError: no such file.
        PackageError: damage, another format, operators that are not there, other scores than were recorded.
    """
    path = Path(path)
    metadata = read_metadata(path)
    _load_operators(metadata, path)
    try:
        package = Package(metadata, _program(path, metadata))
    except (RuntimeError, OSError, ImportError) as error:
        raise PackageError(
            f"{path}, made by torch {metadata.torch}, does not load under {torch.__version__}: {error}"
        ) from error
    trial, device = metadata.trial, torch.device(metadata.device)
    weights = None if trial.weights is None else [torch.tensor(each, device=device) for each in trial.weights]
    scores = package.predict(
        torch.tensor(trial.dense, device=device).view(TRIAL_BATCH, metadata.num_dense),
        torch.tensor(trial.lengths, device=device),
        [torch.tensor(ids, device=device, dtype=torch.int64) for ids in trial.values],
        weights,
    )
    expected = torch.tensor(trial.scores)
    if not torch.allclose(scores.cpu(), expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise PackageError(f"{path} answers {scores.tolist()} where {trial.scores} was recorded: do not serve it")
    return package


def _program(path: Path, metadata: PackageMetadata) -> Callable[..., Tensor]:
    if metadata.kind == "exported":
        return torch.export.load(path).module()
    from torch._inductor import aoti_load_package

    # AOTInductor unpacks and keeps reading its file: give it one that nobody replaces
    with tempfile.TemporaryDirectory() as folder:
        own = shutil.copy(path, Path(folder) / path.name)
        return aoti_load_package(str(own))


def _load_operators(metadata: PackageMetadata, path: Path) -> None:
    if metadata.kernels != "fbgemm":
        return
    from recsys_edu.kernels.backend import fbgemm_status

    status = fbgemm_status()
    if not status.available:
        raise PackageError(
            f"{path} calls FBGEMM's operators, which are not here ({status.reason}): export it with kernels='pytorch'"
        )
