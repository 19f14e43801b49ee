"""Every public name of TorchRec's planner is here with its members; every signature is compared in test_signatures."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

pytest.importorskip("torchrec")

import torchrec.distributed.planner as theirs

OURS, THEIRS = "recsys_edu.distributed.planner", "torchrec.distributed.planner"

# What TorchRec has for itself or for services that are not here; no program needs it to plan.
NOT_HERE = {
    "partitioners": {"ShardingOptionGroup", "OrderedDeviceHardware"},
    "planners": {
        "EmbeddingPlannerBase",
        "validate_compute_kernels",
        "validate_modules_inclusion_in_sharding_plan",
        "validate_rank_assignment",
    },
    "storage_reservations": {"StorageReservationType"},
    "types": {
        "CriticalPathEstimate",
        "HardwareConfig",
        "KernelConfig",
        "TopologyConfigBase",
        "TopologyFactory",
        "TrainerConfig",
        "hash_planner_context_inputs",
        "hash_planner_context_inputs_str",
        "hash_sha256_str",
        "hash_sha256_to_int",
        "round_to_nearest",
    },
    "utils": {
        "build_sharder_data",
        "build_sharder_data_map",
        "extract_comm_data_type_size",
        "is_prefetch_pipelined",
        "storage_repr_in_gb",
    },
}
MODULES = sorted(
    info.name for info in pkgutil.iter_modules(theirs.__path__) if not info.ispkg and info.name not in ("estimator",)
)


def own_names(module: object) -> dict[str, object]:
    """What a module defines itself, in public."""
    home = module.__name__  # type: ignore[attr-defined]
    found = vars(module).items()
    return {n: v for n, v in found if not n.startswith("_") and getattr(v, "__module__", None) == home}


@pytest.mark.parametrize("name", MODULES)
def test_names_and_members(name: str) -> None:
    their_module = importlib.import_module(f"{THEIRS}.{name}")
    our_module = importlib.import_module(f"{OURS}.{name}")
    wanted = own_names(their_module)
    missing = {n for n in wanted if not hasattr(our_module, n)}
    assert missing == NOT_HERE.get(name, set())
    for class_name in sorted(set(wanted) - missing):
        theirs_, ours = wanted[class_name], getattr(our_module, class_name)
        if not inspect.isclass(theirs_):
            continue
        fields = set(getattr(ours, "__dataclass_fields__", ()))
        members = {m for m in vars(theirs_) if not m.startswith("_")}
        assert members <= set(dir(ours)) | fields, class_name


def test_kernels_offered_on_gpus() -> None:
    """TorchRec's sharder names further ones that its enumerator leaves out unless a constraint asks for them."""
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder as TheirSharder

    from recsys_edu.distributed.sharding_plan import get_default_sharders

    ours, their = get_default_sharders()[0], TheirSharder()
    for sharding_type in their.sharding_types("cuda"):
        mine = set(ours.compute_kernels(sharding_type, "cuda")) - {"dense"}
        wanted = set(their.compute_kernels(sharding_type, "cuda")) - {"dense"}
        guarded = {"key_value", "ssd_virtual_table", "dram_virtual_table", "dram_ssd_virtual_table"}
        assert mine == wanted - guarded, sharding_type
