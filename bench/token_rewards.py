"""The measurements of docs/token-rewards.md: what token rewards lean on, and distillation beside SFT.

    python -m bench.token_rewards                          # run again, it goes on where it stopped
    python -m bench.token_rewards --parts audit-demo

audit-demo      `make demo`'s token reward, on responses of its SFT model and of the policy that RTO has trained
audit-stories   the same for stories260k, whose words fall into pieces, with a DPO and a reward model of its own pairs
distill         stories1m and a teacher: own responses against SFT on the teacher's, at equally many tokens

The last two need ../shared beside the checkout. Each model and each figure is kept below RUNS, and made once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the models are too small for a second thread

import torch

from bench.claim.grid import ROOT, by_flags, commit, of_one_size
from bench.claim.report import markdown
from bench.claim.stories import PAIRS, SHARED
from rto_fast import distributed, trainer
from rto_fast.config import DistillConfig, DPOConfig, RMConfig, SFTConfig
from rto_fast.demo import pipeline
from rto_fast.demo.config import DemoConfig
from rto_fast.errors import Diverged, require
from rto_fast.generate import GenerateConfig, generate
from rto_fast.logs.files import METRICS, json_line, read_metrics, read_rows, write_atomic
from rto_fast.scoring.audit import AuditConfig, show
from rto_fast.supervised.dpo import train_dpo
from rto_fast.supervised.reward_model import train_rm
from rto_fast.supervised.sft import train_sft

SIZES = {
    "audit-demo": ("demo_iterations", "demo_prompts", "each"),
    "audit-stories": ("story_pairs", "story_openings", "story_tokens", "each"),
    "distill": ("teacher_rows", "held_out", "iterations", "rollout", "tokens"),
}
"""Part -> the settings that its figures are of."""
PARTS = tuple(SIZES)
ON_CPU: dict[str, Any] = {"dtype": "fp32", "data_workers": 1, "data_cache": False, "gradient_checkpointing": False,
                          "save_minutes": 0.0}  # fmt: skip
DRAWN: dict[str, Any] = {"rollout_engine": "transformers", "rollout_tokens": 16384}

Figures = dict[str, Any]
CORRELATIONS = {
    "score": "the sum of token rewards with the reward model's score",
    "score_within_prompt": "the same within a prompt",
    "prompts": "prompts that have several responses",
    "differences": "token rewards with the reward model's prefix differences",
    "differences_before_last": "the same without the last tokens",
}
"""Figure of an audit -> what it is of."""


@dataclass(frozen=True, kw_only=True)
class TokenRewardConfig:
    """The measurements of docs/token-rewards.md."""

    parts: tuple[str, ...] = PARTS
    """What to measure."""
    runs: str = "runs/token_rewards"
    """Folder of models and figures; what is there is not made again."""
    out: str = "bench/results/token_rewards.json"
    """Results."""

    # Audits
    demo_iterations: int = DemoConfig.iterations
    """Rollouts of the demo's RTO."""
    demo_prompts: int = 256
    """Prompts of the demo that are answered, the first ones."""
    story_pairs: int = 1200
    """Pairs that the stories' DPO and reward model learn from."""
    story_openings: int = 96
    """Openings that are continued."""
    story_tokens: int = 96
    """Tokens of a continuation at most."""
    each: int = 4
    """Responses to each prompt."""

    # Distillation
    teacher_rows: int = 2000
    """Chosen stories that the teacher is fine-tuned on."""
    held_out: int = 256
    """Openings, seen by nobody, on which KL(student || teacher) is measured."""
    iterations: int = 24
    """Rollouts of the student's own responses."""
    rollout: int = 128
    """Responses a rollout."""
    tokens: int = 64
    """Of a response at most."""
    own: tuple[str, ...] = ("3e-4", "1e-3", "3e-4:1")
    """Runs on own responses: learning rate, or learning rate:gamma."""
    sft: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    """Learning rates of SFT on the teacher's samples."""

    def validate(self) -> None:
        require(bool(self.parts), "parts: at least one is needed")
        wrong = [p for p in self.parts if p not in PARTS]
        require(not wrong, f"parts: unknown {', '.join(wrong)}; choose from {', '.join(PARTS)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(not isinstance(value, int) or value > 0, f"{field.name}: must be positive, got {value}")
        for words in self.own:
            require(
                rate_and_gamma(words) is not None,
                f"own: {words!r} is neither a learning rate nor learning rate:gamma, such as 3e-4:1",
            )
        for lr in self.sft:
            require(lr > 0, f"sft: learning rates must be positive, got {lr:g}")
        needs = {*self.parts} - {"audit-demo"}
        require(
            not needs or PAIRS.is_file(), f"parts: {', '.join(sorted(needs))} need {PAIRS}; pass --parts audit-demo"
        )


def rate_and_gamma(words: str) -> tuple[float, float] | None:
    """Of one of `own`; None where it is none. Gamma is 0 where it is not given."""
    try:
        lr, gamma = map(float, words.split(":") if ":" in words else (words, 0))
    except ValueError:
        return None
    return (lr, gamma) if 0 < lr < math.inf and 0 <= gamma <= 1 else None


def kept(path: Path, make: Callable[[], Figures]) -> Figures:
    """The figures at `path`, made where they are not there."""
    if not path.exists():
        write_atomic(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text())


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    write_atomic(path, "".join(map(json_line, rows)))
    return str(path)


def audited(folder: Path, model: Path | str, prompts: str, tokens: int, each: int, **settings: Any) -> Figures:
    """The audit of `each` responses of a model to each prompt."""
    answers = folder.with_suffix(".jsonl")
    generate(GenerateConfig(
        model=str(model), data=prompts, output=str(answers), max_response_length=tokens, responses_per_prompt=each,
        token_logprobs=True, dtype="fp32", **DRAWN,
    ))  # fmt: skip
    return dataclasses.asdict(show(AuditConfig(data=str(answers), dtype="fp32", **settings)))


def audit_demo(config: TokenRewardConfig, root: Path) -> Figures:
    """{model: audit} of the SFT model and of RTO's policy."""
    demo = DemoConfig(output_dir=str(root / "demo"), iterations=config.demo_iterations)
    if not (root / "demo" / "results.json").exists():
        pipeline.run(demo)
    prompts = write(root / "prompts.jsonl", read_rows(root / "demo" / "data" / "prompts.jsonl")[: config.demo_prompts])
    models = {name: str(root / "demo" / name / "model") for name in ("sft", "dpo", "rm")}
    return {
        name: kept(root / f"{name}.json", lambda name=name, model=model: audited(
            root / name, model, prompts, demo.max_response_length, config.each, dpo_model=models["dpo"],
            reference=models["sft"], reward_model=models["rm"], beta1=demo.beta1, dpo_clip=demo.dpo_clip,
        ))
        for name, model in (("SFT", models["sft"]), ("RTO", root / "demo" / "rto" / "policy"))
    }  # fmt: skip


def audit_stories(config: TokenRewardConfig, root: Path) -> Figures:
    """{model: audit} of stories260k itself."""
    rows, model = read_rows(PAIRS), str(SHARED / "models" / "stories260k")
    pairs = write(root / "pairs.jsonl", rows[: config.story_pairs])
    openings = list(dict.fromkeys(r["prompt"] for r in reversed(rows)))[: config.story_openings]
    prompts = write(root / "prompts.jsonl", [{"prompt": p} for p in openings])
    learns = ON_CPU | {"model": model, "data": pairs, "data_split": "train", "eval_split": "", "eval_fraction": 0.1,
                       "batch": 32, "max_length": 256, "invalid_rows": "skip_empty"}  # fmt: skip
    for name, kind, learn, lr in (("dpo", DPOConfig, train_dpo, 5e-4), ("rm", RMConfig, train_rm, 2e-3)):
        if not (root / name / "model").exists():
            learn(kind(output_dir=str(root / name), lr=lr, resume="auto", **learns))
    return {"stories260k": kept(root / "stories260k.json", lambda: audited(
        root / "stories260k", model, prompts, config.story_tokens, config.each, dpo_model=str(root / "dpo" / "model"),
        reference=model, reward_model=str(root / "rm" / "model"), dpo_clip=0.05, beta1=0.05,
    ))}  # fmt: skip


class Distillation:
    """stories1m, and a teacher that is itself fine-tuned on chosen stories."""

    def __init__(self, config: TokenRewardConfig, root: Path) -> None:
        self.config, self.root, self.student = config, root, str(SHARED / "models" / "stories1m")
        rows = read_rows(PAIRS)
        prompts = [{"prompt": p} for p in dict.fromkeys(r["prompt"] for r in rows)]
        wanted = config.iterations * config.rollout
        require(
            config.held_out < len(prompts), f"held_out: {config.held_out} leaves none of the {len(prompts)} openings"
        )
        seen = prompts[: -config.held_out]
        self.held = write(root / "held.jsonl", prompts[-config.held_out :])
        self.seen = write(root / "seen.jsonl", [seen[i % len(seen)] for i in range(wanted)])
        chosen = [{"prompt": r["prompt"], "response": r["chosen"]} for r in rows[: config.teacher_rows]]
        self.teacher = self.fine_tuned("teacher", write(root / "chosen.jsonl", chosen), 1e-3)

    def fine_tuned(self, name: str, data: str, lr: float) -> str:
        if (self.root / name / "model").exists():
            return str(self.root / name / "model")
        return str(train_sft(SFTConfig(
            model=self.student, data=data, lr=lr, output_dir=str(self.root / name), batch=32, eval_split="",
            max_length=256, invalid_rows="skip_empty", resume="auto", micro_tokens=8192, **ON_CPU,
        )))  # fmt: skip

    def settings(self, name: str, policy: str, data: str, **more: Any) -> DistillConfig:
        return DistillConfig(**ON_CPU | {
            "policy": policy, "teacher": self.teacher, "data": data, "output_dir": str(self.root / name),
            "max_prompt_length": 64, "max_response_length": self.config.tokens, "report": False, "sync_proof": False,
            "rollout_engine": "transformers", "score_tokens": 8192, "micro_tokens": 8192, "resume": "auto",
        } | more)  # fmt: skip

    def gap(self, name: str, policy: str) -> Figures:
        """KL(policy || teacher) of a response to the openings that were held out, nats; nothing is trained."""
        count = self.config.held_out
        config = self.settings(
            f"{name}-judged", policy, self.held, iterations=1, rollout_batch=count, train_batch=count, policy_lr=1e-12,
            seed=7,
        )  # fmt: skip
        trainer.train(config)
        return {"kl": read_metrics(Path(config.output_dir) / METRICS)[0]["kl/logratio"]}

    def on_own(self, words: str) -> Figures:
        """Learning rate, or learning rate:gamma, of a run on the student's own responses."""
        lr, gamma = rate_and_gamma(words) or (0.0, 0.0)
        name = f"own-{words.replace(':', '-')}"
        config = self.settings(
            name, self.student, self.seen, iterations=self.config.iterations, rollout_batch=self.config.rollout,
            train_batch=min(16, self.config.rollout), policy_lr=lr, gamma=gamma,
        )  # fmt: skip
        try:
            trainer.train(config)
        except Diverged as error:
            return {"failed": str(error)}
        return self.gap(name, str(Path(config.output_dir) / "policy"))

    def samples(self) -> str:
        """The teacher's answers to as many prompts."""
        path = self.root / "taught.jsonl"
        if not path.exists():
            answers = self.root / "answers.jsonl"
            generate(GenerateConfig(
                model=self.teacher, data=self.seen, output=str(answers), max_response_length=self.config.tokens,
                dtype="fp32", **DRAWN,
            ))  # fmt: skip
            write(path, [{k: r[k] for k in ("prompt", "response")} for r in read_rows(answers)])
        return str(path)

    def run(self) -> Figures:
        found = {"start": kept(self.root / "start.json", lambda: self.gap("start", self.student))}
        for words in self.config.own:
            name = f"own responses, {words}"
            found[name] = kept(self.root / f"{name}.json", lambda words=words: self.on_own(words))
        for lr in self.config.sft:
            name = f"SFT on the teacher's, {lr:g}"
            found[name] = kept(self.root / f"{name}.json", lambda lr=lr: self.gap(
                f"sft-{lr:g}", self.fine_tuned(f"sft-{lr:g}", self.samples(), lr)
            ))  # fmt: skip
        return found


def audit_table(audits: Figures) -> str:
    """Markdown: share of the tokens, of |reward|, and clipped, of each kind and tenth; then the correlations."""
    names = list(audits)
    header = ["", *(f"{what}, {n}" for n in names for what in ("tokens", "of &#124;reward&#124;", "clipped"))]
    groups = {n: {g["name"]: g for g in [*audits[n]["kinds"], *audits[n]["places"]]} for n in names}
    rows = [
        [
            kind,
            *(share(groups[n].get(kind, {}).get(w)) for n in names for w in ("token_share", "reward_share", "clipped")),
        ]
        for kind in dict.fromkeys(k for n in names for k in groups[n])
    ]
    agreements = {n: audits[n]["agreement"] for n in names}
    correlations = [[title, *(number(agreements[n][what]) for n in names)] for what, title in CORRELATIONS.items()]
    return markdown(header, rows) + "\n\n" + markdown(["correlation of", *names], correlations)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else f"{value}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def distill_table(found: Figures) -> str:
    rows = [[name, f"{f['kl']:.2f}" if "kl" in f else f["failed"]] for name, f in found.items()]
    return markdown(("student", "KL to the teacher, nats a response"), rows)


def main(config: TokenRewardConfig) -> None:
    config.validate()
    distributed.init()
    torch.set_num_threads(1)
    found, runs = {}, ROOT / config.runs
    for part in config.parts:
        of_one_size(runs / part, "figures", {name: getattr(config, name) for name in SIZES[part]})
    for part in config.parts:
        root = runs / part
        if part == "distill":
            found[part] = Distillation(config, root).run()
        else:
            found[part] = (audit_demo if part == "audit-demo" else audit_stories)(config, root)
        print(f"\n{part}\n\n{(distill_table if part == 'distill' else audit_table)(found[part])}\n", flush=True)
    record = {"commit": commit(), "settings": dataclasses.asdict(config)} | found
    write_atomic(ROOT / config.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    by_flags(main, TokenRewardConfig, __doc__)
