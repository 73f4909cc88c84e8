"""Packed models in the wrappers of torch.distributed, in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from test_surgery import IDS, OPTIONS, model
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kbit_inductor as kbit
from kbit_inductor.models.surgery import packed_matrices

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="torch was built without gloo")


def sharded(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard, sharded], ids=["DDP", "FSDP2", "FSDP1"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_wrappers_leave_the_codes_alone_and_train_what_is_around_them(wrap: Callable[[nn.Module], nn.Module]) -> None:
    packed = kbit.quantize_(model(), OPTIONS)
    exact = copy.deepcopy(packed)
    wrapped = wrap(packed)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    outputs = [each(IDS) for each in (wrapped, exact)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    optimizer.step()
    torch.optim.SGD(exact.parameters(), 0.1).step()
    output = wrapped(IDS)
    torch.testing.assert_close(output, exact(IDS))
    assert not torch.equal(output, outputs[0])
    before = [matrix.packed.operands[0] for matrix in packed_matrices(exact)]
    after = [matrix.packed.operands[0] for matrix in packed_matrices(wrapped)]
    assert len(after) == 6 and all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    keys = {key.removeprefix("module.") for key in wrapped.state_dict()}
    assert keys == set(exact.state_dict())
