"""A reward server for the tests of this folder."""

from __future__ import annotations

import pytest
from reward_helpers import Server


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
