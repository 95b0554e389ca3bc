"""vLLM servers on this machine: weights over gloo, samples over their sockets.

They agree with the trainer or the run stops.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from stat import S_IMODE

import psutil
import pytest
import torch
from engine_helpers import HEADS, assert_same_weights, figures, moved, partial, rows, stale
from loop_helpers import ROOT, make_tiny_models, small_run
from rollout_helpers import quiet, reference_logp, requests_of
from transformers import AutoModelForCausalLM

from rto_fast.config import RTOConfig
from rto_fast.errors import ConfigError, EngineFailure, RolloutError, SyncError
from rto_fast.rollout.engine import Sampling
from rto_fast.rollout.vllm_engines import servers
from rto_fast.rollout.vllm_engines.server_process import Server
from rto_fast.rollout.vllm_engines.servers import VLLMServeEngine
from rto_fast.rollout.vllm_engines.support import installed

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not installed(), reason="vLLM is not installed (make install-vllm)"),
]


class Served:
    """Tiny models and a server that holds their policy; each engine joins it anew."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        self.tied, self.models = tied, make_tiny_models(folder / "models", tied=tied, **HEADS)
        self.owner = VLLMServeEngine(
            self.models.policy, CPU, torch.float32, folder=folder, max_length=64, max_sequences=64
        )
        self.url = self.owner.urls[0]

    def engine(self, **settings) -> VLLMServeEngine:
        base = {"urls": [self.url], "max_length": 64, "max_sequences": 64, "timeout_s": 60.0}
        return VLLMServeEngine(self.models.policy, CPU, torch.float32, **(base | settings))

    def config(self, folder: Path, **settings) -> dict:
        base = {"rollout_engine": "vllm-serve", "vllm_url": (self.url,), "policy_lr": 0.01, "iterations": 3,
                "vllm_max_sequences": 16}  # fmt: skip
        return small_run(self.models, folder, **(base | settings))


@pytest.fixture(scope="module")
def tied(one_rank, tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("tied"), tied=True)
    yield made
    made.owner.close()


@pytest.fixture(scope="module")
def untied(one_rank, tmp_path_factory):
    made = Served(tmp_path_factory.mktemp("untied"), tied=False)
    yield made
    made.owner.close()


@pytest.fixture(params=["tied", "untied"])
def served(request):
    return request.getfixturevalue(request.param)


# Log-probs


def test_no_response_ends_before_its_least_length(tied):
    engine, requests, stops, least = tied.engine(), requests_of(24, 80), tuple(range(1, 10)), 5  # EOS is 1
    policy = AutoModelForCausalLM.from_pretrained(tied.models.policy)
    engine.push(((n, p.detach()) for n, p in policy.named_parameters()), 0)
    rollout = engine.generate(requests, Sampling(16, 0.7, stops, least), quiet)
    assert int(rollout.response_lens.min()) == least + 1
    truth = reference_logp(tied.models.policy, rollout, 0.7, stops, least)
    torch.testing.assert_close(rollout.sampler_logp.double(), truth, atol=5e-5, rtol=0)


def test_log_probs_before_and_after_a_push(served, tmp_path):
    engine, requests, sampling = served.engine(), requests_of(12, 80), Sampling(16, 0.7, (2,))
    policy = AutoModelForCausalLM.from_pretrained(served.models.policy)
    with pytest.raises(SyncError, match="no weights were pushed yet"):
        engine.generate(requests, sampling, quiet)
    engine.push(((n, p.detach()) for n, p in policy.named_parameters()), 0)
    first = engine.generate(requests, sampling, quiet)
    truth = reference_logp(served.models.policy, first, 0.7)
    torch.testing.assert_close(first.sampler_logp.double(), truth, atol=5e-5, rtol=0)
    weights = moved(served.models.policy, 0.3)
    stats = engine.push(weights.items(), 4)
    assert stats.bytes == sum(4 * w.numel() for w in weights.values())
    assert stats.digests.keys() == weights.keys()
    policy.load_state_dict(weights, strict=False)
    policy.save_pretrained(tmp_path)
    second = engine.generate(requests, sampling, quiet)
    assert (first.version, second.version) == (0, 4)
    assert (reference_logp(served.models.policy, second, 0.7) - second.sampler_logp).abs().max() > 0.1
    torch.testing.assert_close(second.sampler_logp.double(), reference_logp(tmp_path, second, 0.7), atol=5e-5, rtol=0)
    turned = engine.generate(requests[::-1], sampling, quiet).select(range(11, -1, -1))
    assert torch.equal(turned.tokens, second.tokens)
    assert torch.equal(turned.sampler_logp, second.sampler_logp)


def test_small_buckets_bring_the_same(tied, monkeypatch):
    weights = moved(tied.models.policy, 0.3)
    whole = tied.engine().push(weights.items(), 1)
    monkeypatch.setattr(servers, "BUCKET_BYTES", 1000)
    assert tied.engine().push(weights.items(), 1).digests == whole.digests


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"model\.norm"),
        (lambda w: w.update(extra=torch.zeros(2)), "extra: pushed, but"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight: pushed with shape \[3\]"),
    ],
)
def test_a_push_of_other_weights_is_refused(tied, change, message):
    engine, weights = tied.engine(), moved(tied.models.policy, 0.1)
    change(weights)
    with pytest.raises(SyncError, match=message):
        engine.push(weights.items(), 1)
    with pytest.raises(SyncError, match="incomplete"):
        engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)
    engine.push(moved(tied.models.policy, 0.1).items(), 2)  # the server is none the worse
    assert engine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet).version == 2


def test_weights_that_diverged(tied):
    engine, weights = tied.engine(), moved(tied.models.policy, 0.1)
    weights["model.norm.weight"][3] = float("nan")
    engine.push(weights.items(), 1)
    with pytest.raises(RolloutError, match="not finite at prompt row"):
        engine.generate(requests_of(2, 80), Sampling(4, 1.0, ()), quiet)


def test_another_runs_push_is_noticed(tied):
    mine, other = tied.engine(), tied.engine(timeout_s=30.0)
    other.push(moved(tied.models.policy, 0.1).items(), 7)
    mine.torn, mine.version = "", 3  # as after a push of its own
    with pytest.raises(EngineFailure, match="version 7, 3 was pushed last"):
        mine.generate(requests_of(2, 80), Sampling(2, 1.0, ()), quiet)


# Who reaches the recipe's servers


def test_no_other_account_reaches_the_server(tied):
    """Its HTTP and its processes' own sockets lie in a closed folder; gloo alone has ports, on loopback."""
    server = tied.owner.servers[0]
    assert tied.url == f"unix:{server.folder}/socket"
    assert S_IMODE(server.folder.stat().st_mode) == 0o700
    leader = psutil.Process(server.process.pid)
    processes = [leader, *leader.children(recursive=True)]
    assert len(processes) > 1
    sockets = {Path(c.laddr) for p in processes for c in p.net_connections("unix") if str(c.laddr).startswith("/")}
    assert server.folder / "socket" in sockets
    assert {path.parent for path in sockets} == {server.folder}
    ports = {p.pid: [c for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN] for p in processes}
    assert ports.pop(leader.pid) == []
    assert {c.laddr.ip for found in ports.values() for c in found} <= {"127.0.0.1"}


def test_two_servers_get_the_same_weights(tied, tmp_path):
    """Each has a folder of its own, and both meet the trainer in the first one's; nothing of either is left."""
    weights, sampling = moved(tied.models.policy, 0.3), Sampling(16, 0.7, (2,))
    requests = [replace(q, sample_index=i) for i, q in enumerate(requests_of(6, 80))]
    one = tied.engine()
    one.push(weights.items(), 1)
    expected = one.generate(requests, sampling, quiet)
    two = VLLMServeEngine(
        tied.models.policy, CPU, torch.float32, folder=tmp_path, max_length=64, max_sequences=64, devices=("", "")
    )
    try:
        folders = [server.folder for server in two.servers]
        assert len(set(folders)) == 2
        assert (folders[0] / "weights").exists()
        two.push(weights.items(), 1)
        rollout = two.generate(requests, sampling, quiet)
    finally:
        two.close()
    assert torch.equal(rollout.tokens, expected.tokens)
    assert torch.equal(rollout.sampler_logp, expected.sampler_logp)
    assert not any(folder.exists() for folder in folders)


# Servers that do not fit


def test_a_server_that_cannot_serve_the_run(tied, monkeypatch):
    with pytest.raises(ConfigError, match=r"64 tokens a sequence \(max_model_len\)"):
        tied.engine(max_length=65)
    with pytest.raises(EngineFailure, match=r"127\.0\.0\.1:9: no answer after 0.5 s"):
        tied.engine(urls=["http://127.0.0.1:9"], start_timeout_s=0.5)
    monkeypatch.setattr(servers, "OLDEST_SERVED", "0.99")
    with pytest.raises(ConfigError, match=r"vllm_url: .*: vLLM 0\.\d+\.\d+.* is too old \(0\.99 or newer is needed\)"):
        tied.engine()


def test_a_start_that_fails_shows_the_log(tied, tmp_path):
    with pytest.raises(EngineFailure, match=r"(?s)vLLM ended while it started\n  from .*vllm-0\.log:.*max_num_seqs"):
        VLLMServeEngine(tied.models.policy, CPU, torch.float32, folder=tmp_path, max_length=64, max_sequences=-1)


def test_settings_that_contradict_each_other():
    base = {"policy": "p", "beta1": 0.0, "beta3": 0.0, "data": "d"}
    for change, message in (
        ({"vllm_url": ("http://x",)}, "vllm_url: is for --rollout-engine vllm-serve"),
        ({"rollout_engine": "vllm-serve", "vllm_url": ("x:1",)}, "must start with http"),
        ({"rollout_engine": "vllm-serve", "vllm_url": ("http://x", "http://x")}, "comes twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            RTOConfig(**base, **change).validate()


def test_a_server_dies_with_its_trainer(tmp_path):
    """Even one that is killed, at any moment."""
    code = f"""
import os, signal
from pathlib import Path
from rto_fast.rollout.vllm_engines.server_process import Server
server = Server({{"model": "none"}}, (), Path({str(tmp_path)!r}) / "log")
print(server.process.pid, server.folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert out.returncode == -signal.SIGKILL
    server, folder = out.stdout.split()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{server}/stat").exists() and Path(f"/proc/{server}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    assert not Path(folder).exists()


# Whole runs


def test_every_token_agrees_after_each_of_three_steps(served, tmp_path, launch):
    """The tied model with ZeRO-2, the untied one with ZeRO-3; two ranks."""
    config = served.config(tmp_path / "run", iterations=4, zero_stage=2 if served.tied else 3)
    result = launch([ROOT / "tests" / "vllm_worker.py", json.dumps([config])], ranks=2)
    assert result.returncode == 0, result.output
    log = rows(tmp_path / "run")
    assert len(log) == 4
    assert all(row["sampler/logp_diff_max"] < 5e-5 for row in log), log
    assert log[-1]["kl/response"] > 0.1  # the weights did move
    assert all(row["sync/bytes"] > 0 for row in log)


def skipped(monkeypatch, engine_class):
    """The second push of the run says that all went well and does nothing."""
    plain, last = engine_class._transfer, []

    def transfer(engine, weights, version):
        if version < 2:
            last.append(plain(engine, weights, version))
        return last[-1]

    monkeypatch.setattr(engine_class, "_transfer", transfer)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(skipped, "other bytes than sent"), (stale, "other bytes than sent"), (partial, r"up_proj|gate_up")],
)
def test_a_broken_sync_stops_the_run(tied, tmp_path, one_rank, monkeypatch, fault, message):
    from rto_fast import trainer

    fault(monkeypatch, VLLMServeEngine)
    with pytest.raises(SyncError, match=message):
        trainer.train(RTOConfig(**tied.config(tmp_path / "run", policy_lr=5e-7, warmup_ratio=0.0)))


def kills_servers(monkeypatch, times: int) -> list[Server]:
    """The recipe's server is killed in the middle of the second rollout, and what replaces it; the victims so far.

    One request is asked again of the dead server: the others' answers may all have come already.
    """
    plain, victims = VLLMServeEngine._ask, []

    async def ask(engine, client, url, body):
        answer = await plain(engine, client, url, body)
        if engine.version == 1 and len(victims) < times and engine.servers[0] not in victims:
            victims.append(engine.servers[0])
            victims[-1].process.kill()
            victims[-1].process.wait()
            return await plain(engine, client, url, body)
        return answer

    monkeypatch.setattr(VLLMServeEngine, "_ask", ask)
    return victims


def test_a_server_killed_in_mid_rollout_is_replaced_once(tied, tmp_path, one_rank, monkeypatch):
    """The outcome is that of a run whose server lives."""
    from rto_fast import trainer

    trainer.train(RTOConfig(**tied.config(tmp_path / "whole")))
    victims = kills_servers(monkeypatch, 1)
    trainer.train(RTOConfig(**tied.config(tmp_path / "broken", vllm_url=())))
    assert len(victims) == 1
    rewards = [[row["reward/total"] for row in rows(tmp_path / name)] for name in ("whole", "broken")]
    assert rewards[0] == rewards[1]
    assert not process_group(victims[0].process.pid)
    assert not victims[0].folder.exists()


def test_a_server_killed_twice_stops_the_run_and_it_resumes(tied, tmp_path, one_rank, monkeypatch):
    from rto_fast import trainer

    with monkeypatch.context() as patch:
        victims = kills_servers(patch, 2)
        with pytest.raises(RolloutError, match="failed twice in a row"):
            trainer.train(RTOConfig(**tied.config(tmp_path, vllm_url=(), save_every=1)))
        assert len(victims) == 2
    trainer.train(RTOConfig(**tied.config(tmp_path, save_every=1, resume="auto")))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


# The next batch while this one trains


def test_a_lag_of_one_samples_by_the_policy_before(tied, tmp_path, one_rank):
    """Rollout k is of version k - 1; its tokens are those that this version gives to its requests."""
    from rto_fast import trainer

    seen = []

    def observe(rollout, texts):
        seen.append(rollout)
        return {}

    run = trainer.train(RTOConfig(**tied.config(tmp_path / "run", rollout_lag=1, iterations=4)), observe)
    log = rows(tmp_path / "run")
    assert [r.version for r in seen] == [0, 0, 1, 2]
    assert [row["rollout/lag"] for row in log] == [0, 1, 1, 1]
    assert log[0]["sampler/logp_diff_max"] < 5e-5
    assert all(row["sampler/logp_diff_mean"] > 1e-3 for row in log[1:])
    assert all(0 < row["sampler/weight_mean"] < 2 for row in log)
    engine = tied.engine()
    policy = AutoModelForCausalLM.from_pretrained(tied.models.policy)
    engine.push(((n, p.detach()) for n, p in policy.named_parameters()), 0)
    for iteration, same in ((0, True), (1, True), (2, False)):
        first = engine.generate(run.requests(iteration), run.sampling, quiet)
        assert torch.equal(first.tokens, seen[iteration].tokens) == same
        if same:
            assert torch.equal(first.sampler_logp, seen[iteration].sampler_logp)


def test_a_lagging_run_is_killed_and_resumed(tied, tmp_path, launch):
    """A checkpoint holds the rollout that was sampled ahead, so the outcome is that of the run that lives."""
    settings = {"rollout_lag": 1, "iterations": 5, "save_every": 1, "policy_lr": 1e-3, "resume": "auto"}
    worker = ROOT / "tests" / "vllm_worker.py"
    whole, killed = (tied.config(tmp_path / name, **settings) for name in ("whole", "killed"))
    assert launch([worker, json.dumps([whole])]).returncode == 0
    run, path = launch.start([worker, json.dumps([killed])]), tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not path.exists() or len(path.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.005)
    run.kill()
    assert len(rows(tmp_path / "killed")) < 5
    result = launch([worker, json.dumps([killed])])
    assert result.returncode == 0, result.output
    assert [row["step"] for row in rows(tmp_path / "killed")] == [1, 2, 3, 4, 5]
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert_same_weights(tmp_path / "killed" / "policy", tmp_path / "whole" / "policy")


def test_an_engine_that_fails_ahead_samples_anew(tied, tmp_path, one_rank, monkeypatch):
    from rto_fast import trainer

    plain, left = VLLMServeEngine.generate, [1]

    def generate(engine, *args):
        if engine.version == 1 and left.pop():
            left.append(0)
            raise EngineFailure("gone")
        return plain(engine, *args)

    monkeypatch.setattr(VLLMServeEngine, "generate", generate)
    trainer.train(RTOConfig(**tied.config(tmp_path, rollout_lag=1, iterations=4)))
    assert [row["rollout/lag"] for row in rows(tmp_path)] == [0, 1, 0, 1]


def process_group(leader: int) -> list[int]:
    """Living processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found
