from __future__ import annotations

import pytest

from fade_kernels_cpu import build


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Compiled for real where that has not been done yet; without a compiler there is nothing to test."""
    try:
        build.library()
    except build.BuildError as error:
        pytest.skip(str(error))
