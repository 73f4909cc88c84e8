"""The caches of Inductor and AOTAutograd serve code, never weights: neither another model's, another backend's, nor other bits'.

Caches on disk are tried from fresh processes. Each gets a list of steps, compiles a model for each and prints what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
from kbit_inductor.testing import dequantized_copy, relative_error


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def run(backend, seed, options=None):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(seed)
    model, x = Block(), torch.randn(4, 64)
    y = torch.compile(model, backend=backend, options=options)(x)
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    twin = dequantized_copy(model) if backend == "kbit" else model
    return {"hits": hits, "to_twin": relative_error(y, twin(x)), "to_float": relative_error(y, model(x))}


with torch.no_grad():
    print(json.dumps([run(*step) for step in json.loads(sys.argv[1])]))
"""

# Two float32 evaluations of a chain of two dot products of K = 128 terms: each is off by at most K·u·Σ|xᵢwᵢ|, u = 2⁻²⁴ (Higham,
# 2002, section 3.1), and for terms of random sign Σ|xᵢwᵢ| is √K times the sum itself.
ROUNDING = 2 * 2 * 128**1.5 * 2.0**-24

PLAIN = ["inductor", 0]
KBIT = ["kbit", 0, {"bits": 4, "activation_bits": 16}]
FEWER = ["kbit", 0, {"bits": 3, "activation_bits": 16}]
SYMMETRIC = ["kbit", 0, {"bits": 4, "symmetric": True, "activation_bits": 16}]
OTHER_PLAIN = ["inductor", 1]
OTHER_KBIT = ["kbit", 1, {"bits": 4, "activation_bits": 16}]
OTHER_FEWER = ["kbit", 1, {"bits": 3, "activation_bits": 16}]


def fresh_process(cache: Path, *steps: list[Any]) -> list[dict[str, float]]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(steps)
    return results


def assert_float(result: dict[str, float]) -> None:
    assert result["to_float"] <= ROUNDING


def assert_packed(result: dict[str, float]) -> None:
    assert result["to_twin"] <= ROUNDING
    # A uniform weight's error at 3 bits is 1/7 of its root mean square, at 4 bits 1/15, and x itself is exact.
    assert 10 * ROUNDING < result["to_float"] < 0.2


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(scope="module")
def first(cache: Path) -> list[dict[str, float]]:
    """A process that fills the cache: plain Inductor before kbit, and several ways of packing."""
    return fresh_process(cache, PLAIN, KBIT, FEWER, SYMMETRIC)


@pytest.fixture(scope="module")
def second(cache: Path, first: list[dict[str, float]]) -> list[dict[str, float]]:
    """A later process with other weights, in another order: kbit before plain Inductor."""
    return fresh_process(cache, OTHER_FEWER, OTHER_KBIT, OTHER_PLAIN)


def test_plain_inductor_is_not_served_to_kbit(first: list[dict[str, float]]) -> None:
    plain, kbit, *_ = first
    assert_float(plain)
    assert_packed(kbit)


def test_every_way_of_packing_is_right_in_one_cache(first: list[dict[str, float]]) -> None:
    _, kbit, fewer, symmetric = first
    for result in (kbit, fewer, symmetric):
        assert_packed(result)
    assert fewer["to_float"] > kbit["to_float"]


def test_a_fresh_process_is_served_code_from_the_cache_and_uses_its_own_weights(second: list[dict[str, float]]) -> None:
    fewer, kbit, _ = second
    for result in (fewer, kbit):
        assert result["hits"] > 0  # else this tests nothing
        assert_packed(result)
    assert fewer["to_float"] > kbit["to_float"]


def test_plain_inductor_after_kbit_is_served_its_own_code(second: list[dict[str, float]]) -> None:
    plain = second[-1]
    assert plain["hits"] > 0
    assert_float(plain)


def test_kbit_is_not_served_to_plain_inductor(tmp_path: Path) -> None:
    kbit, plain = fresh_process(tmp_path, KBIT, PLAIN)
    assert_packed(kbit)
    assert_float(plain)


def test_a_graph_that_calls_methods_on_products_can_be_cached_by_aotautograd() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = torch.nn.Embedding(40, 64), torch.nn.Linear(64, 64)

        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            return self.fc(self.table(indices).transpose(0, 1)).view(-1, 4, 16).relu()

    counters = torch._dynamo.utils.counters["aot_autograd"]
    counters.clear()
    with torch.no_grad(), torch._functorch.config.patch(strict_autograd_cache=True):  # a graph it cannot cache is an error
        torch.compile(Model(), backend="kbit")(torch.arange(8).view(2, 4))
    assert counters["autograd_cache_saved"] == 1
