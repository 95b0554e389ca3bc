"""Beams of the demo's DPO model and guided decoding of its SFT model, judged by the task's true reward.

python -m bench.decoding --seeds 0 1 2 3 4       # trains what is not there of SFT, reward model, DPO
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import tyro
from rich.console import Console

from bench.theory.token_mdp import TokenMDP
from rto_fast import distributed
from rto_fast.contract import Request, Rollout
from rto_fast.data.chat_template import load_template
from rto_fast.data.tokenizer import stop_token_ids
from rto_fast.demo.config import DemoConfig
from rto_fast.demo.judge import Judge, task_judge, true_rewards
from rto_fast.demo.pipeline import prepare
from rto_fast.demo.tiny_task import TinyTask, make_task
from rto_fast.rollout.beams import beam_search
from rto_fast.rollout.engine import Sampling, sample_seed
from rto_fast.rollout.guided import GuidedEngine
from rto_fast.rollout.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class DecodingConfig:
    """Decodes the demo's models without any RL."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the demo."""
    runs: str = "runs/demo_seeds"
    """Folder of the demos, SEED in seedSEED; what is there is not trained again."""
    beams: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Widths of the beam on the DPO model."""
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Weights of the guide's log-ratio, the DPO model's against the SFT model's."""
    prompts: int = 256
    """Of the demo's evaluation prompts, from the first."""


def rollouts(task: TinyTask, config: DecodingConfig, demo: DemoConfig, root: Path) -> Iterator[tuple[str, Rollout]]:
    """(what was done, its responses to the evaluation prompts)."""
    tokenizer, template = task.tokenizer, load_template("auto", task.tokenizer)
    prompts = [row["prompt"] for row in task.prompts(demo.eval_prompts, seed=4)][: config.prompts]
    sft, dpo = (str(root / name / "model") for name in ("sft", "dpo"))
    requests = [
        Request(tuple(template.encode_prompt(tokenizer, p)), i, i, 0, sample_seed(demo.seed, i, 3, 0))
        for i, p in enumerate(prompts)
    ]
    sampling = Sampling(demo.max_response_length, 1.0, stop_token_ids(dpo, tokenizer, template))
    loading = (distributed.device(), torch.float32, tokenizer.pad_token_id or 0)

    def sampled(engine: TransformersEngine) -> Rollout:
        return engine.generate(requests, sampling, lambda tokens, ended: None)

    yield "SFT, sampled", sampled(TransformersEngine(sft, *loading))
    engine = TransformersEngine(dpo, *loading)
    yield "DPO, sampled", sampled(engine)
    for power, beams in itertools.product((0.0, 1.0), config.beams):
        found = beam_search(engine, requests, sampling, beams, power)
        yield f"DPO, {beams} beams, penalty {power:g}", found
    for scale in config.scales:
        yield (
            f"SFT guided by DPO, scale {scale:g}",
            sampled(GuidedEngine(sft, *loading, guide=dpo, reference="", scale=scale)),
        )


def figures(task: TinyTask, judge: Judge, rollout: Rollout) -> tuple[float, float, float]:
    """Means over responses of (true reward, log(drawn from / SFT) in nats, tokens)."""
    count = len(rollout)
    ratio = float(rollout.sampler_logp.sum() - torch.cat(judge.logps(judge.sft, rollout)).sum())
    return mean(true_rewards(task, rollout)), ratio / count, float(rollout.response_lens.float().mean())


def gap(scale: float, seeds: int = 20) -> float:
    """KL(guided || optimum), nats, on token MDPs of 3 actions and 4 tokens.

    The reference's logits are N(0, 1), the guide's N(0, .5) around them. Guided: each token in proportion to
    pi_ref * (pi_dpo / pi_ref)^scale. Optimum: each whole response so.
    """
    mdp, out = TokenMDP(actions=3, horizon=4), []
    for seed in range(seeds):
        ref = mdp.policy(mdp.random_tables(seed))
        moved = mdp.random_tables(1000 + seed, scale=0.5)
        dpo = mdp.policy([r + m for r, m in zip(ref, moved, strict=True)])
        tilted = [r + scale * (d - r) for r, d in zip(ref, dpo, strict=True)]
        guided = mdp.along(mdp.policy(tilted)).sum(1)
        best = mdp.along(tilted).sum(1).log_softmax(0)
        out.append(float((guided.exp() * (guided - best)).sum()))
    return mean(out)


def show(rows: dict[str, list[tuple[float, float, float]]]) -> None:
    def cell(values: list[float]) -> str:
        return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    print("| | true reward | log(drawn from / SFT), nats | tokens |\n|---|---|---|---|")
    for name, seeds in rows.items():
        print(f"| {name} | " + " | ".join(cell([s[i] for s in seeds]) for i in range(3)) + " |")


def main(config: DecodingConfig, report: Callable[[dict], None] = show) -> None:
    """Prints means and deviations over the seeds."""
    distributed.init()
    torch.set_num_threads(1)
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed in config.seeds:
        root = Path(config.runs) / f"seed{seed}"
        demo = DemoConfig(output_dir=str(root), seed=seed)
        task = make_task(seed, demo.difficulty)
        prepare(task, demo, root, Console(quiet=True))
        judge = task_judge(task, demo, root)
        for name, rollout in rollouts(task, config, demo, root):
            rows.setdefault(name, []).append(figures(task, judge, rollout))
    report(rows)
    print("\nKL(guided || optimum), token MDPs:", {s: round(gap(s), 4) for s in (0.5, 1.0, 2.0, 5.0)})


if __name__ == "__main__":
    main(tyro.cli(DecodingConfig))
