"""A run that is scored by a server with a password: the password stays out of its files, and may change."""

from __future__ import annotations

import json

import pytest
from loop_helpers import small_run
from reward_helpers import Server

from rto_fast import trainer
from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError
from rto_fast.logs.files import read_metrics
from rto_fast.report.page import report_run

OLD, NEW = "first-secret", "second-secret"


@pytest.fixture
def server(monkeypatch):
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def settings_of(server, tiny, folder, secret, **more):
    url = server.url.replace("http://", f"http://user:{secret}@") + f"?key={secret}"
    return RTOConfig(**small_run(
        tiny, folder, reward_model=(), reward_url=(url,), critic="policy", beta1=0.0, dpo_model="", save_every=1, **more
    ))  # fmt: skip


def test_a_password_lands_in_no_file_and_may_be_rotated(tiny, tmp_path, one_rank, server):
    folder = tmp_path / "run"
    trainer.train(settings_of(server, tiny, folder, OLD, iterations=1))
    state = next(folder.glob("checkpoints/step-*/state.json"))
    record = json.loads(state.read_text())
    assert record["config"]["reward_url"] == [server.url]
    # As earlier versions wrote it
    record["config"]["reward_url"] = [server.url.replace("http://", f"http://user:{OLD}@")]
    state.write_text(json.dumps(record))
    server.url += "/elsewhere"
    with pytest.raises(ConfigError, match=r"resume: .* other settings: .*reward_url") as refused:
        trainer.train(settings_of(server, tiny, folder, NEW, iterations=1, resume="auto"))
    assert "secret" not in str(refused.value)
    server.url = server.url.removesuffix("/elsewhere")
    trainer.train(settings_of(server, tiny, folder, NEW, iterations=1, resume="auto"))
    assert len(read_metrics(folder / "metrics.jsonl")) == 1
    state.unlink()
    report_run(folder)
    spilt = [str(p) for p in folder.rglob("*") if p.is_file() and b"-secret" in p.read_bytes()]
    assert not spilt
    assert server.url in (folder / "report.html").read_text()
