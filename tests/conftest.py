"""What every test starts from: caches of its own session, a fixed seed, and a Dynamo that remembers no other test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A stale entry of a user's cache would hide a bug, so the session has empty ones. torch reads these names when it is imported:
# they must be set before. Workers of pytest-xdist inherit those of the session that starts them.
_is_worker = "PYTEST_XDIST_WORKER" in os.environ
if not _is_worker:
    _caches = tempfile.TemporaryDirectory(prefix="kbit-tests-", ignore_cleanup_errors=True)
    for _name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "KBIT_CACHE_DIR"):
        os.environ[_name] = os.path.join(_caches.name, _name.lower())  # noqa: PTH118 (an environment holds strings)
else:
    # Threads of OpenMP wait for each other by spinning: with two workers on two cores they would wait for milliseconds.
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402 (see above)

from kbit_inductor import config, entry_points, kernel_registry  # noqa: E402
from kbit_inductor.passes import registry as passes  # noqa: E402
from kbit_inductor.quantizers import registry as quantizers  # noqa: E402

# No deadline, and slow examples are no fault: the first example of a shape may compile a kernel.
settings.register_profile("kbit", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("kbit-ci", settings.get_profile("kbit"), derandomize=True)
settings.load_profile("kbit-ci" if os.environ.get("CI") else "kbit")


# A worker takes a file at a time, in this order: a long one that came last would keep one worker busy and no other.
LONGEST_FILES = (
    "test_transformers.py", "test_benchmarks.py", "test_triton_kernels.py", "test_packaging.py", "test_generator.py",
    "test_generate.py", "test_caches.py", "test_cpu_build.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: position for position, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    # What a test compiled holds its model, packed weights and all.
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _float_activations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rounding activations to 8 bits would hide every smaller mistake. Tests of that rounding ask for it, or are marked.
    if "rounded_activations" not in request.keywords:
        monkeypatch.setattr(config, "AUTO_ACTIVATION_BITS", 16)


@pytest.fixture
def one_thread_without_grad() -> Iterator[None]:
    # OpenMP's threads wait for each other by spinning: on a busy machine that takes a hundred times as long as such small models.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def unregister() -> Iterator[None]:
    """Forget what a test registers."""
    known = [(table, dict(table)) for table in (passes._by_name, kernel_registry._by_name, quantizers._by_name)]
    yield
    for table, before in known:
        table.clear()
        table.update(before)
    entry_points.load.cache_clear()
