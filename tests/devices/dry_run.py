"""Every stage on a device that only claims to be one, and the same with planted faults; or on the one that is there.

python dry_run.py OUT [NAMES]          # OUT: a JSON file {name of a case or fault: how it failed, "" = it did not}
python dry_run.py --real OUT [NAMES]   # the cases on this machine's own device, with its DeepSpeed and its kernels

In a dry run DeepSpeed is a stand-in, a plain optimiser: the device's name means nothing to it, and what is looked at is
where this package's own tensors lie. Kernels take their PyTorch path.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import claimed
import torch
from loop_helpers import TinyModels, make_tiny_models, save_reward_model, small_run, write_rows
from torch import Tensor, nn

CASES: dict[str, Callable[[TinyModels, Path], None]] = {}


class Whole:
    """What the trainer asks of a DeepSpeed engine, with the whole model in one place."""

    def __init__(self, model: nn.Module, optimizer: Any = None, config: Any = None) -> None:
        from rto_fast import distributed

        self.module, self.optimizer = model.to(distributed.device()), optimizer
        self.boundary, self.norm = True, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        self.boundary = boundary

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        assert loss.device == claimed.device(), "the loss is on the CPU"
        loss.backward()

    def step(self) -> None:
        assert self.boundary
        self.norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return self.norm

    def was_step_applied(self) -> bool:
        return True

    def save_checkpoint(self, folder: str, tag: str, exclude_frozen_parameters: bool) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        state = {name: p.detach().cpu() for name, p in self.module.named_parameters()}
        torch.save(state, Path(folder) / tag / "state.pt")

    def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> tuple[str, None]:
        state = torch.load(Path(folder) / tag / "state.pt")
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                p.copy_(state[name])
        return folder, None


def case(function: Callable[[TinyModels, Path], None]) -> Callable[[TinyModels, Path], None]:
    CASES[function.__name__] = function
    return function


def loop(tiny: TinyModels, folder: Path, **settings: Any) -> None:
    """An iteration of the loop."""
    from rto_fast import distributed
    from rto_fast.config import RTOConfig
    from rto_fast.trainer import train

    common = {"report": False, "save_minutes": 0.0, "iterations": 1, "sync_proof": False}
    run = train(RTOConfig(**small_run(tiny, folder, **(common | settings))))
    device = distributed.device()
    assert all(p.device == device for p in run.policy.model.parameters()), f"the policy is not on {device}"


@case
def rto(tiny: TinyModels, folder: Path) -> None:
    second, third = folder / "reward2", folder / "reward3"
    save_reward_model(second, Path(tiny.policy), seed=5, mean=0.0, std=1.0)
    save_reward_model(third, Path(tiny.policy), seed=6, mean=0.1, std=2.0)
    for path in (second, third):
        for file in Path(tiny.policy).glob("*token*"):
            (path / file.name).write_bytes(file.read_bytes())
    renamed = third / "tokenizer.json"  # reads texts of its own
    renamed.write_text(re.sub(r'"lowercase": *false', '"lowercase": true', renamed.read_text()))
    loop(
        tiny, folder / "run", reward_model=(tiny.reward, str(second), str(third)), dpo_ref=tiny.dpo_ref,
        truncation="bootstrap", entropy_coef=0.01, ema_decay=0.5, kl_target=0.1, credit="sentence", park_frozen=True,
        delimiters=("e",), sync_proof=True, iterations=2,
    )  # fmt: skip


@case
def ppo(tiny: TinyModels, folder: Path) -> None:
    loop(
        tiny, folder, beta1=0.0, loss_aggregation="token", truncated_reward=-1.0, temperature=0.7, min_response_length=3
    )


@case
def resume(tiny: TinyModels, folder: Path) -> None:
    from rto_fast import distributed

    settings = {"iterations": 2, "save_every": 1, "ema_decay": 0.5}
    loop(tiny, folder / "run", **settings)
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000002")
    (folder / "run" / "policy").rename(folder / "first")
    loop(tiny, folder / "run", resume="auto", **settings)
    first, again = ((path / "model.safetensors").read_bytes() for path in (folder / "first", folder / "run" / "policy"))
    # A dry run shows where tensors lie, and draws other numbers at each start.
    assert first == again if distributed.device().type != claimed.NAME else len(first) == len(again)


@case
def reinforce_pp(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, advantage="reinforce_pp", credit="response")


@case
def grpo(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, advantage="grpo", responses_per_prompt=2, rollout_batch=4)


@case
def rloo(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, advantage="rloo", responses_per_prompt=2, rollout_batch=4, zero_stage=0, sync_proof=True)


@case
def p3o(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, policy_update="p3o", responses_per_prompt=2, rollout_batch=4)


@case
def rebel(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, policy_update="rebel", responses_per_prompt=2, rollout_batch=4)


@case
def sampler(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, behaviour_logp="sampler", ppo_epochs=2)


@case
def unpacked(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, packing="off", rollout_oversample=0.25)


@case
def online_prime(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, online="prime", dpo_ref=tiny.dpo_ref, online_order="before")


@case
def online_pairs(tiny: TinyModels, folder: Path) -> None:
    loop(tiny, folder, online="dpo", responses_per_prompt=2, rollout_batch=4, online_order="after")


def places(token_ids: list[list[int]]) -> list[list[float]]:
    """A function of token rewards."""
    return [[i / 7 for i in range(len(ids))] for ids in token_ids]


@case
def token_rewards(tiny: TinyModels, folder: Path) -> None:
    sources = (
        f"logratio:{tiny.dpo_ref}:{tiny.dpo}", "endogenous", f"scalar:{tiny.reward}", f"scalar-diff:{tiny.reward}",
        "fn:dry_run:places",
    )  # fmt: skip
    loop(
        tiny, folder, token_reward=("dpo", *sources), dpo_model=(tiny.dpo, tiny.dpo_ref), dpo_pessimism=0.5,
        credit="segment", park_frozen=True,
    )  # fmt: skip


@case
def distill(tiny: TinyModels, folder: Path) -> None:
    from rto_fast.config import DistillConfig
    from rto_fast.trainer import train

    common = {"report": False, "save_minutes": 0.0, "iterations": 1, "sync_proof": False}
    settings = small_run(tiny, folder, **common)
    settings = {name: value for name, value in settings.items() if name not in ("dpo_model", "reward_model")}
    train(DistillConfig(**settings, teacher=tiny.dpo, base=tiny.dpo_ref))


@case
def rlvr(tiny: TinyModels, folder: Path) -> None:
    from rto_fast.config import RLVRConfig
    from rto_fast.trainer import train

    rows = [{"question": f"A fox had {i}.", "answer": f"#### {i}"} for i in range(16)]
    common = {"report": False, "save_minutes": 0.0, "iterations": 1, "sync_proof": False, "rollout_batch": 4}
    settings = small_run(tiny, folder / "run", **common) | {
        "data": write_rows(folder / "rows.jsonl", rows), "reward_model": (), "responses_per_prompt": 2,
        "reward_fn": ("rto_fast.scoring.math_answers:last_number",),
    }  # fmt: skip
    train(RLVRConfig(**settings))


def supervised(tiny: TinyModels, folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model": tiny.policy, "data": tiny.pairs, "output_dir": str(folder / "run"), "dtype": "fp32", "batch": 8,
        "max_rows": 24, "max_length": 64, "eval_fraction": 0.2, "gradient_checkpointing": False, "data_cache": False,
        "data_workers": 1, "micro_tokens": 256, "save_minutes": 0.0,
    } | settings  # fmt: skip


@case
def sft(tiny: TinyModels, folder: Path) -> None:
    from rto_fast.config import SFTConfig
    from rto_fast.supervised.sft import train_sft

    train_sft(SFTConfig(**supervised(tiny, folder, data=tiny.texts)))


@case
def rm(tiny: TinyModels, folder: Path) -> None:
    from rto_fast.config import RMConfig
    from rto_fast.supervised.reward_model import train_rm

    rows = [json.loads(line) | {"margin": 0.5} for line in Path(tiny.pairs).read_text().splitlines()]
    train_rm(RMConfig(**supervised(tiny, folder, data=write_rows(folder / "rows.jsonl", rows), margin_weight=0.5)))


@case
def q_rm(tiny: TinyModels, folder: Path) -> None:
    from rto_fast.config import RMConfig
    from rto_fast.supervised.reward_model import train_rm

    train_rm(RMConfig(**supervised(tiny, folder, objective="q_rm")))


def preference(objective: str, tiny: TinyModels, folder: Path, **settings: Any) -> None:
    from rto_fast.config import DPOConfig
    from rto_fast.supervised.dpo import train_dpo

    train_dpo(DPOConfig(**supervised(tiny, folder, objective=objective, **settings)))


@case
def dpo(tiny: TinyModels, folder: Path) -> None:
    preference("dpo", tiny, folder, label_smoothing=0.1, nll_coef=0.1)


for objective in ("r_dpo", "ipo", "tdpo1", "tdpo2", "kto", "simpo", "mpo", "mppo"):
    CASES[objective] = partial(preference, objective)


@case
def tgdpo(tiny: TinyModels, folder: Path) -> None:
    preference("tgdpo", tiny, folder, guide_model=tiny.dpo)


@case
def tis_dpo(tiny: TinyModels, folder: Path) -> None:
    preference("tis_dpo", tiny, folder, guide_model=tiny.dpo, guide_base=tiny.dpo_ref)


@case
def generate(tiny: TinyModels, folder: Path) -> None:
    from rto_fast import distributed
    from rto_fast.contract import Request
    from rto_fast.rollout.engine import Sampling
    from rto_fast.rollout.transformers_engine import TransformersEngine

    engine = TransformersEngine(tiny.policy, distributed.device(), torch.float32, 0, rollout_tokens=60)
    asked = [Request(tuple(range(3, 4 + n)), n, n, 0, n) for n in range(8)]
    assert len(engine.generate(asked, Sampling(10, 0.9, (2,), 2))) == len(asked)
    engine.sleep()
    engine.wake()
    assert len(engine.generate(asked, Sampling(10, 1.0, (2,)))) == len(asked)


@dataclass(frozen=True)
class Fault:
    """A line of the package changed, in which case it is met, and the line that must be named."""

    function: str
    """module:qualified name."""
    old: str
    new: str
    case: str
    found: tuple[str, str]
    """File below rto_fast/ and what its line holds."""


FAULTS = {
    "a packed batch's responses": Fault(
        "rto_fast.models.packing:PackedBatch.make", "cu_responses=offsets(lens - prompts).to(device)",
        "cu_responses=offsets(lens - prompts)", "dpo", ("supervised/stage.py", "torch.segment_reduce("),
    ),
    "a table of the reference": Fault(
        "rto_fast.supervised.pair_objectives:Referenced.judge", "batch.looked_up(self.reference).to(logp.device)",
        "batch.looked_up(self.reference)", "dpo", ("supervised/pair_objectives.py", "self.ref_logp"),
    ),
    "a reward model's scores": Fault(
        "rto_fast.scoring.reward_model:ModelReward.score", "values.float().cpu()", "values.float()", "ppo",
        ("scoring/reward_model.py", "out[torch.tensor(index)] ="),
    ),
    "prompts of a sampler": Fault(
        "rto_fast.rollout.transformers_engine:TransformersEngine.prefill", "input_ids=ids.to(self.device)",
        "input_ids=ids", "generate", ("rollout/transformers_engine.py", "logits = self.model("),
    ),
    "stop tokens of a sampler": Fault(
        "rto_fast.rollout.transformers_engine:TransformersEngine.generate", "stops = stops.to(self.device)",
        "stops = stops", "generate", ("rollout/transformers_engine.py", "logits.masked_fill(stops"),
    ),
    "ends of sentences": Fault(
        "rto_fast.algo.targets:targets_of", "torch.isin(rollout.response_tokens, delimiters).to(cu.device)",
        "torch.isin(rollout.response_tokens, delimiters)", "rto", ("algo/credit.py", "delimiter"),
    ),
    "the sampler's log-probs": Fault(
        "rto_fast.updates.sampler_corrected:SamplerBatch.update_policy", "self.rollout.sampler_logp.to(device)",
        "self.rollout.sampler_logp", "sampler", ("updates/sampler_corrected.py", "sampler_logp[r]"),
    ),
    "the sampler's gap": Fault(
        "rto_fast.rollout.weights.sync:WeightSync._gap", "out.float().cpu()", "out.float()", "rloo",
        ("rollout/weights/sync.py", "logp[rollout.response_index(index)] ="),
    ),
}  # fmt: skip


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """Inside, the function's code is that of the changed line; its lines keep their numbers."""
    module_name, name = fault.function.split(":")
    module = importlib.import_module(module_name)
    source = Path(module.__file__).read_text()
    assert source.count(fault.old) == 1, f"{fault.old!r} stands {source.count(fault.old)} times in {module_name}"
    wrong = compile(source.replace(fault.old, fault.new), module.__file__, "exec", dont_inherit=True)
    found: Any = module
    for part in name.split("."):
        found = found.__dict__[part] if isinstance(found, type) else getattr(found, part)
    found = getattr(found, "__func__", found)
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    right = found.__code__
    found.__code__ = next(code for code in _codes(wrong) if code.co_qualname == name)
    try:
        yield
    finally:
        found.__code__ = right


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def place_of(error: BaseException) -> tuple[str, str]:
    """(file below rto_fast/, the whole statement's lines) of the innermost frame there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/rto_fast/" in f.filename]
    last = frames[-1]
    lines = Path(last.filename).read_text().splitlines()[last.lineno - 1 : last.end_lineno]
    return last.filename.rpartition("/rto_fast/")[2], " ".join(lines)


def attempt(name: str, tiny: TinyModels, folder: Path) -> str:
    """How a case fails, "" = it does not."""
    try:
        CASES[name](tiny, folder)
    except BaseException as error:
        return "".join(traceback.format_exception(error))
    return ""


def attempt_fault(fault: Fault, tiny: TinyModels, folder: Path) -> str:
    """How a planted fault was missed, "" = it was found at its line."""
    with planted(fault):
        try:
            CASES[fault.case](tiny, folder)
        except claimed.DeviceMix as error:
            file, line = place_of(error)
            if file == fault.found[0] and fault.found[1] in line:
                return ""
            return f"found at {file}: {line}"
        except BaseException as error:
            return "".join(traceback.format_exception(error))
    return "not found"


@contextmanager
def dry() -> Iterator[None]:
    """Inside, this process's device is the claimed one, and engines are stand-ins."""
    import deepspeed
    from transformers import PreTrainedModel

    from rto_fast import distributed

    claimed.install()
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    def read_on_the_host(cls: Any, *args: Any, device_map: Any = None, **given: Any) -> Any:
        """safetensors knows real devices alone; the engines bring the models to theirs."""
        return from_pretrained(cls, *args, **given)

    initialize = lambda **given: (Whole(**given),)  # noqa: E731
    with (
        mock.patch.object(distributed, "device", claimed.device),
        mock.patch.object(deepspeed, "initialize", initialize),
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(read_on_the_host)),
        claimed.on_device(),
    ):
        yield


def main() -> None:
    from rto_fast import distributed

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true")
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    wanted = args.names or [*CASES, *(() if args.real else FAULTS)]
    distributed.init()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "tiny").mkdir()
        tiny = make_tiny_models(root / "tiny")
        with nullcontext() if args.real else dry():
            for number, name in enumerate(wanted):
                folder = root / str(number)
                folder.mkdir()
                found[name] = (
                    attempt(name, tiny, folder) if name in CASES else attempt_fault(FAULTS[name], tiny, folder)
                )
                print(name, "failed" if found[name] else "passed", flush=True)
                args.out.write_text(json.dumps(found))
    if args.real and any(found.values()):
        raise SystemExit("\n".join(error for error in found.values() if error))


if __name__ == "__main__":
    main()
