"""Each test that takes `backend` runs with every set of instructions, and on emulated CUDA."""

from collections.abc import Iterator

import pytest

from tests.helpers.kernels import BACKENDS, has_backend, using


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of what serves CPU tensors."""
    if not has_backend(request.param):
        pytest.skip(f"this CPU has not {request.param}")
    with using(request.param):
        yield request.param
