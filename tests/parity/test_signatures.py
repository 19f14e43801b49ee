"""Every public name that TorchRec also has, at the same place, takes the same arguments."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import pkgutil

import pytest

import recsys_edu

torchrec = pytest.importorskip("torchrec")

# Facts of the contract (section 12 and the notes at each name) where TorchRec is not followed.
NOT_COMPARED = {
    ("distributed.types", "ShardedTensor"),  # torch's own class, not TorchRec's
    # A test utility there, with dummy tensors and a copy stream; the contract is its four attributes.
    ("models.dlrm", "ModelInput"),
    ("models.deepfm", "ModelInput"),
}


def own_modules() -> list[str]:
    found = pkgutil.walk_packages(recsys_edu.__path__, "recsys_edu.")
    return sorted(info.name.removeprefix("recsys_edu.") for info in found if "__main__" not in info.name)


def counterparts() -> list[tuple[str, str]]:
    """(module path, name) of every public class and function that both packages define or re-export there."""
    found: dict[int, tuple[str, str]] = {}
    for path in own_modules():
        try:
            theirs = importlib.import_module(f"torchrec.{path}")
        except ImportError:
            continue
        try:
            ours = importlib.import_module(f"recsys_edu.{path}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("recsys_edu"):
                raise
            continue  # a third-party package of that module is missing beside torchrec
        for name, value in sorted(vars(ours).items()):
            is_ours = getattr(value, "__module__", "").startswith("recsys_edu")
            if name.startswith("_") or not is_ours or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            their_value = getattr(theirs, name, None)
            their_home = getattr(their_value, "__module__", None) or ""
            if not their_home.startswith("torchrec") or (path, name) in NOT_COMPARED:
                continue
            if id(value) not in found or their_home == f"torchrec.{path}":  # once, and best where TorchRec defines it
                found[id(value)] = (path, name)
    return sorted(found.values())


def parameters_of(function) -> list[inspect.Parameter]:
    try:
        return [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    except ValueError:
        return []  # dict and other builtins tell nothing


def same_default(ours, theirs) -> bool:
    if ours is theirs or isinstance(theirs, dataclasses.Field):
        return True
    if isinstance(ours, enum.Enum) and isinstance(theirs, enum.Enum):
        return (type(ours).__name__, ours.name) == (type(theirs).__name__, theirs.name)
    if type(ours).__name__ == "_HAS_DEFAULT_FACTORY_CLASS":
        return True  # made per object: a list there, or an instance that TorchRec shares
    if callable(ours) and callable(theirs):
        return getattr(ours, "__name__", None) == getattr(theirs, "__name__", None)
    if dataclasses.is_dataclass(theirs) or type(theirs).__module__.startswith("torchrec"):
        return type(ours).__name__ == type(theirs).__name__
    return bool(ours == theirs)


def differences(ours, theirs) -> list[str]:
    """What is wrong with our signature.

    Positional arguments are compared in order, keyword-only ones by name; an argument that stands behind
    `*args` there may be positional here. Further arguments at our end need defaults.
    """
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    mine = [p for p in parameters_of(ours) if p.kind not in variadic]
    wanted = parameters_of(theirs)
    takes_args = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in wanted)
    wanted = [p for p in wanted if p.kind not in variadic]
    by_name = {p.name: p for p in mine}
    wrong = []
    for index, want in enumerate(wanted):
        is_keyword = want.kind is inspect.Parameter.KEYWORD_ONLY
        have = by_name.get(want.name) if is_keyword else mine[index] if index < len(mine) else None
        if have is None or have.name != want.name:
            wrong.append(f"argument {index} is {have}, expected {want.name}")
            break
        if have.kind is not want.kind and not takes_args:
            wrong.append(f"{want.name} is {have.kind.description}, expected {want.kind.description}")
        if (have.default is inspect.Parameter.empty) is not (want.default is inspect.Parameter.empty):
            wrong.append(f"{want.name} has default {have.default}, expected {want.default}")
        elif want.default is not inspect.Parameter.empty and not same_default(have.default, want.default):
            wrong.append(f"{want.name} defaults to {have.default!r}, expected {want.default!r}")
    known = {p.name for p in wanted}
    extra = [p.name for p in mine if p.default is inspect.Parameter.empty and p.name not in known]
    if extra and not wrong and not takes_args:
        wrong.append(f"further arguments without default: {', '.join(extra)}")
    return wrong


def unwrap(attribute):
    if isinstance(attribute, (staticmethod, classmethod)):
        return attribute.__func__
    return attribute


@pytest.mark.parametrize("path, name", counterparts(), ids=lambda part: part)
def test_signature_equals_torchrecs(path: str, name: str) -> None:
    ours = getattr(importlib.import_module(f"recsys_edu.{path}"), name)
    theirs = getattr(importlib.import_module(f"torchrec.{path}"), name)
    assert inspect.isclass(ours) is inspect.isclass(theirs)
    if inspect.isclass(ours) and issubclass(ours, enum.Enum):
        assert {member.name: member.value for member in theirs}.items() <= {m.name: m.value for m in ours}.items()
        return
    if not inspect.isclass(ours):
        assert differences(ours, theirs) == []
        return
    wrong = {}
    if not inspect.isabstract(theirs) and theirs.__init__ is not object.__init__:
        wrong["__init__"] = differences(ours, theirs)
    for method, attribute in vars(theirs).items():
        if method.startswith("_") or not inspect.isfunction(unwrap(attribute)):
            continue
        own_attribute = inspect.getattr_static(ours, method, None)
        if own_attribute is None:
            continue  # what we do not build is another test's matter
        if isinstance(attribute, staticmethod) is not isinstance(own_attribute, staticmethod):
            wrong[method] = [f"is {type(own_attribute).__name__}, expected {type(attribute).__name__}"]
        elif inspect.isfunction(unwrap(own_attribute)):
            wrong[method] = differences(unwrap(own_attribute), unwrap(attribute))
    faults = [f"{method}: {fault}" for method, found in wrong.items() for fault in found]
    assert not faults, f"{path}.{name} differs from TorchRec's: " + "; ".join(faults)


def test_there_is_something_to_compare() -> None:
    assert {("modules.embedding_modules", "EmbeddingBagCollection"), ("models.dlrm", "DLRM")} <= set(counterparts())
