"""Nothing here looks at the Hub."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def offline():
    """Names drawn here are not looked up on the Hub."""
    import datasets
    import huggingface_hub.constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield
