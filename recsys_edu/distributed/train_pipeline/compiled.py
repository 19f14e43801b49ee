"""A pipeline that compiles its model after a few steps.

Counterpart: TrainPipelinePT2 and TorchCompileConfig of torchrec.distributed.train_pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from recsys_edu.distributed.train_pipeline.base import TrainPipelineBase
from recsys_edu.distributed.train_pipeline.pipeline_context import In, Out
from recsys_edu.distributed.types import ShardedModule


@dataclass
class TorchCompileConfig:
    """torch.compile's `fullgraph`, `dynamic` and `backend`, and the step (from 0) before which to compile."""

    fullgraph: bool = False
    dynamic: bool | None = None
    backend: str = "inductor"
    compile_on_iter: int = 3


class TrainPipelinePT2(TrainPipelineBase[In, Out]):
    """TrainPipelineBase whose model is compiled with torch.compile at a given step.

    Sharded modules are left as they are: they talk to other ranks, whose number of ids changes with every batch, and a
    compiler cannot look into that. The dense layers around them are compiled. Fused operations round differently, so
    losses equal the plain loop's up to rounding. The default backend needs a C++ compiler.

    Args:
        model, optimizer, device: as TrainPipelineBase's.
        compile_configs: default: inductor, before the fourth step.
        pre_compile_fn, post_compile_fn: called with the model around the compilation.
        input_transformer: applied to every batch before the model gets it.

    Counterpart: torchrec.distributed.train_pipeline.train_pipelines.TrainPipelinePT2.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        compile_configs: TorchCompileConfig | None = None,
        pre_compile_fn: Callable[[nn.Module], None] | None = None,
        post_compile_fn: Callable[[nn.Module], None] | None = None,
        input_transformer: Callable[[In], In] | None = None,
    ) -> None:
        transform = None if input_transformer is None else lambda batch: model(input_transformer(batch))
        super().__init__(model, optimizer, device, custom_model_fwd=transform)
        self._config = compile_configs or TorchCompileConfig()
        self._pre_compile_fn, self._post_compile_fn = pre_compile_fn, post_compile_fn
        self._num_steps = 0

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        if self._num_steps == self._config.compile_on_iter:
            self._compile()
        output = super().progress(dataloader_iter)
        self._num_steps += 1
        return output

    def _compile(self) -> None:
        if self._pre_compile_fn is not None:
            self._pre_compile_fn(self._model)
        for module in self._model.modules():
            if isinstance(module, ShardedModule):
                module.forward = torch.compiler.disable(module.forward)
        config = self._config
        self._model.compile(fullgraph=config.fullgraph, dynamic=config.dynamic, backend=config.backend)
        if self._post_compile_fn is not None:
            self._post_compile_fn(self._model)
