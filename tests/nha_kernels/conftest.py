"""Where kernels run without a GPU: in the emulator of `emulator`, or in Triton's interpreter for tests that ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nha_kernels.fused.limits import why_unavailable

from .helpers import ON_GPU

if not ON_GPU and why_unavailable("cpu") is None:
    from nha_kernels.fused.primitives import Launch

    from .emulator import run

    by_interpreter = Launch.__call__

    @pytest.fixture(scope="session", autouse=True)
    def _emulated() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "__call__", lambda launch: run(launch))
            yield

    @pytest.fixture
    def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
        """Triton's own takes ten times as long, and neither bf16 nor Gluon; it keeps the emulator honest."""
        monkeypatch.setattr(Launch, "__call__", by_interpreter)

else:

    @pytest.fixture
    def interpreted() -> None:
        """On a GPU kernels are themselves."""
