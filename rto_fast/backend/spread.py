"""Whole models to ZeRO-3's partitions, one parameter at a time.

DeepSpeed by itself would first cast the whole model, on every rank. The partitions are those that it would make.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rto_fast import distributed


def spread(model: nn.Module, settings: dict[str, Any]) -> None:
    """Gives every rank its part of rank 0's weights; collective. One rank alone is left as it is.

    model: on the other ranks its shapes are enough (models/skeleton.py). settings: DeepSpeed's, of stage 3.
    """
    if distributed.world_size() == 1:
        return
    import deepspeed

    device = distributed.device()
    first: Any = next((p for p in model.parameters() if hasattr(p, "ds_id")), None)
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):  # it belongs to a model that is taken apart already, too
            continue
        dtype = torch.bfloat16 if settings["bf16"]["enabled"] and parameter.is_floating_point() else parameter.dtype
        if distributed.rank() == 0:
            parameter.data = parameter.data.to(device, dtype)
        else:
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device=device)
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings, dtype=dtype)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    model.to(device)  # the buffers, which DeepSpeed leaves where they are in a model that is partitioned already
