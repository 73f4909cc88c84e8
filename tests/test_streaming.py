"""Hessians of one block at a time: the same codes as with all of them, in less memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import kbit_inductor as kbit
from kbit_inductor.models import surgery
from kbit_inductor.quantizers import Statistics

OPTIONS = {"bits": 3, "quantizer": "gptq", "min_elements": 0}


class Residual(nn.Module):
    """Two layers and their sum with what they are given."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """A table that is the head too, blocks, and a layer that two of them share."""

    def __init__(self, count=4, width=16):
        super().__init__()
        self.table = nn.Embedding(24, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(count))
        self.blocks[1].up.weight = self.blocks[0].up.weight
        self.head = nn.Linear(width, 24)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made():
    torch.manual_seed(0)
    return Stack().eval(), torch.randint(24, (6, 16))


def test_the_codes_are_those_of_a_calibration_of_all_layers(one_thread_without_grad):
    streamed, ids = made()
    whole, _ = made()
    kbit.quantize_(whole, OPTIONS, kbit.calibrate(whole, ids.split(2), OPTIONS))
    kbit.quantize_(streamed, OPTIONS, iter(ids.split(2)))
    for name, wanted in kbit.dequantize_(whole).state_dict().items():
        torch.testing.assert_close(kbit.dequantize_(streamed).state_dict()[name], wanted, rtol=0, atol=0, msg=name)


def test_there_are_hessians_of_one_block_and_of_what_is_in_none(one_thread_without_grad, monkeypatch):
    model, ids = made()
    swap, held = surgery._swap, []

    def watched(*arguments):
        alive = [each.hessian for each in gc.get_objects() if type(each) is Statistics and each.hessian is not None]
        held.append(sum(hessian.nbytes for hessian in {id(hessian): hessian for hessian in alive}.values()))
        return swap(*arguments)

    gc.collect()
    monkeypatch.setattr(surgery, "_swap", watched)
    kbit.quantize_(model, OPTIONS, ids.split(2))
    block, head, shared = 4 * (16**2 + 32**2), 4 * 16**2, 2 * 4 * 16**2
    assert len(held) == 8 and max(held) <= block + head + shared < 2 * block


def test_bad_data_leaves_the_model_as_it_was(one_thread_without_grad):
    model, ids = made()
    with pytest.raises(kbit.EmptyCalibrationError):
        kbit.quantize_(model, OPTIONS, [])
    with torch.no_grad():
        model.table.weight[ids[0, 0]] = 1e30
    with pytest.raises(kbit.NonFiniteActivationError):
        kbit.quantize_(model, OPTIONS, ids.split(2))
    assert isinstance(model.blocks[3].up, nn.Linear)
