"""Weights that FSDP2 shares out over processes, and their checkpoints.

torch.distributed.checkpoint writes a safetensors file per process, without pickle, and reads them into any
number of processes: shared out again, or whole.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed import is_initialized
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

FOLDER = "sharded"  # of a checkpoint


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether weights are shared out.

    Raises:
        ValueError: for what FSDP does otherwise than FSDP2, or not with it.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    version = accelerator.state.fsdp_plugin.fsdp_version
    if version != 2:
        raise ValueError(
            f"fsdp_version={version} of accelerate must be 2: accelerate launch --fsdp_version 2"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("mixed_precision='fp16' must be bf16 or no with FSDP")
    return True


def plan_sharding(accelerator: Accelerator, model: Any) -> None:
    """Each block of the model is to be shared out by itself, in float32, and computed in mixed precision."""
    plugin = accelerator.state.fsdp_plugin
    names = {type(module).__name__ for module in model.modules()}
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [name for name in model._no_split_modules if name in names]
    if accelerator.mixed_precision == "bf16":
        # Inputs are not cast: 999.5 is no bfloat16. `autocast` sees to the rest.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def autocast(accelerator: Accelerator, model: nn.Module) -> None:
    """What accelerate does for models that it does not shard: forwards in mixed precision."""
    if accelerator.mixed_precision == "bf16":
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)


def share_out_again(model: nn.Module) -> None:
    """Drop the whole weights that a forward without gradient leaves in a model; `parameters` has parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out, in all processes; each must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor that may be shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save(
    folder: Path,
    model: nn.Module,
    averaged: Mapping[str, Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """Write the checkpoint; all processes at once."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # of torch 2.9

    tensors = _weights(model, averaged)
    for name, weight, state in _states(model, optimizers):
        tensors |= {f"optimizer.{name}.{key}": _row(value) for key, value in state[weight].items()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save_tensors(tensors, storage_writer=writer, no_dist=not is_initialized())


def load(
    folder: Path,
    model: nn.Module,
    averaged: Mapping[str, Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """Read a checkpoint of any number of processes; all processes at once."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    tensors = _weights(model, averaged)
    for name, weight, state in _states(model, optimizers):
        state[weight] = {}
        for name_in_file in saved:
            of, _, key = name_in_file.removeprefix("optimizer.").rpartition(".")
            if of == name and name_in_file.startswith("optimizer."):
                value = torch.zeros_like(weight)
                if key == "step":
                    value = torch.zeros((), dtype=torch.float32, device=weight.device)
                state[weight][key] = value
                tensors[name_in_file] = _row(value)
    load_tensors(tensors, storage_reader=reader, no_dist=not is_initialized())


def _weights(model: nn.Module, averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {f"model.{name}": weight.detach() for name, weight in model.named_parameters()}
    return weights | {f"averaged.{name}": weight for name, weight in averaged.items()}


def _states(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> Iterable[tuple[str, Tensor, dict[Tensor, dict[str, Tensor]]]]:
    """Name and weight of each one that is trained, and the state of the optimizer that has it."""
    names = {weight: name for name, weight in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                yield names[weight], weight, optimizer.state


def _row(value: Tensor) -> Tensor:
    """With a dimension: files of several processes have none without."""
    return value.view(1) if value.ndim == 0 else value
