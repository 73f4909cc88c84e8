"""Folders as other projects write them, of a model with one layer, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import kbit_inductor as kbit

HALF = 2.0**-11  # the relative error of a number rounded to float16


class Model(nn.Module):
    """One layer."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.fc = nn.Linear(columns, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def write(folder: Path, tensors: dict[str, Any], **quantization: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    plain = {name: torch.from_numpy(t.copy()) if isinstance(t, np.ndarray) else t.contiguous() for name, t in tensors.items()}
    save_file(plain, folder / "model.safetensors")
    return folder


def imported(folder: Path, rows: int, columns: int, **told: Any) -> Any:
    return kbit.from_checkpoint(folder, lambda: Model(rows, columns), **told).fc
