"""A model's responses to a benchmark's prompts.

In the files that AlpacaEval 2 and Arena-Hard read.

    rto-fast generate --model runs/rto/policy --data alpaca_eval.json --format alpaca_eval --output rto.json

    alpaca_eval  one JSON list of {instruction, output, generator, dataset}; data: rows {instruction[, dataset]}
    arena_hard   JSON lines; rows {question_id, turns} (version 0.1) give {question_id, answer_id, model_id, choices,
                 tstamp}, rows {uid, prompt} (version 2) give {uid, ans_id, model, messages, tstamp, metadata}.
                 Style control's counts are added by Arena-Hard's own utils/add_markdown_info.py.
    jsonl        JSON lines {row, prompt, response, generator, tokens, truncated}; with --responses-per-prompt also
                 response_index, with --token-logprobs token_ids and logprobs, with --reference ref_logprobs and kl

--beams searches for the likeliest responses in place of sampling, --guide-model moves the model's logits by another
model's log-ratio.

The output appears when it is whole. Finished responses wait beside it in `<output>.partial`: run the same command
again and it goes on from there, to the same file bit for bit (but for Arena-Hard's time stamp). Exit code 2: the
input cannot work, and nothing was written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rto_fast import cli
from rto_fast.config import TEMPLATE_DATE, RTOConfig, expand_home
from rto_fast.contract import Request
from rto_fast.data.adapter_folder import base_of, read_adapter
from rto_fast.data.chat_template import ChatTemplate, check_template, load_template
from rto_fast.data.row_formats import PROMPT_KEYS, BadRow, check_text, prompt_row, row_of
from rto_fast.data.sources import Table, open_source
from rto_fast.data.tokenizer import check_max_length, check_min_length, check_vocabulary, load_tokenizer, stop_token_ids
from rto_fast.errors import DataError, require
from rto_fast.logs.files import json_line, mend, read_rows, write_atomic
from rto_fast.models.load import DTYPES, check_weights, load_config, load_policy, place
from rto_fast.models.save import full_parameters
from rto_fast.rollout.engine import GREEDY, Sampling, sample_seed
from rto_fast.rollout.make_engine import make_engine

KEPT = {"dataset", "question_id", "uid"}
"""Columns of the data that stand in the written file."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Responses of a model to a benchmark's prompts."""

    model: str = ""
    """Policy folder or Hub id, or the folder of an adapter, which is merged."""
    data: str = ""
    """Prompts: Hub id, local .jsonl/.json/.parquet/.csv file, or a folder saved by `datasets`."""
    output: str = ""
    """File to write; must not exist. AlpacaEval wants the ending .json."""
    format: Literal["alpaca_eval", "arena_hard", "jsonl"] = "jsonl"
    """What the file looks like."""
    generator: str = ""
    """Name of the model in the file; empty = the last two parts of `model`, joined by an underscore."""
    data_split: str = "train"
    """Split of a Hub data set or saved folder."""
    max_rows: int = 0
    """Prompts used, from the first; 0 = all."""
    prompt_key: str = "auto"
    """Column of the prompt; auto: `turns`, `context_messages`, `prompt` or `instruction`, whichever is there first."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, else the plain one; plain; or the path of a Jinja file."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD: the day that a chat template writes where it asks for today's date."""
    temperature: float = 1.0
    """Sampling temperature (top-p 1, as in training); see also greedy."""
    responses_per_prompt: int = 1
    """Responses sampled from each prompt; more than 1 for jsonl alone."""
    greedy: bool = False
    """Take the likeliest token each time, at no temperature."""
    beams: int = 0
    """Search with so many beams for the likeliest responses in place of sampling: the best `responses_per_prompt` of
    each prompt, best first. At temperature 1, by the transformers engine. 0 = off."""
    length_penalty: float = 0.0
    """Beams rank responses by log-prob / tokens ** this, as in transformers: 0 = log-prob, 1 = its mean a token."""
    guide_model: str = ""
    """Guided decoding: a model (folder or Hub id) whose log-ratio against `guide_ref` is added to the model's logits,
    guide_scale * (log guide - log ref). By the transformers engine."""
    guide_ref: str = ""
    """The guide's reference; empty = `model`, which is then not loaded twice."""
    guide_scale: float = 1.0
    """Weight of the guide's log-ratio. With a DPO model and the SFT model, beta1 / beta2 stands in for RTO without a
    sentence-level reward; 0 = off."""
    max_response_length: int = 1024
    """Tokens of a response at most."""
    min_response_length: int = 0
    """Tokens before the one that may end a response, as in training: up to there the sampler leaves stop tokens out.
    0 = off."""
    token_logprobs: bool = False
    """jsonl: write each response's token ids and their log-probs (nats): the model's own at temperature 1, however the
    tokens were sampled; of guided responses, those of the distribution that they were drawn from."""
    reference: str = ""
    """jsonl: a second model (folder or Hub id), whose log-probs of the same tokens are written too, and as `kl` the sum
    of log(model / reference) over the response; its mean estimates the KL where temperature is 1. Turns token_logprobs
    on."""
    packing: Literal["on", "off"] = "on"
    """Forwards for log-probs, as in training; off: one sequence a row, slower, and right for every family."""
    seed: int = 0
    """Seed of the sampling; each response's own seed derives from it, the row and the response's number."""
    rollout_engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that samples; auto: vLLM where it is installed and knows the model, else transformers."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type."""
    rollout_tokens: int = 65536
    """Tokens (prompt + response) the transformers engine samples at once, and a forward for log-probs holds."""
    chunk: int = 256
    """Responses between two saves of the work so far."""

    def __post_init__(self) -> None:
        expand_home(self)

    def validate(self) -> None:
        """Raises ConfigError on settings that contradict each other; needs no model and no data."""
        for name in ("model", "data", "output"):
            require(bool(getattr(self, name)), f"{name}: missing; pass --{name}")
        for name in ("max_response_length", "rollout_tokens", "chunk", "responses_per_prompt"):
            require(getattr(self, name) >= 1, f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("max_rows", "min_response_length"):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        require(
            self.min_response_length < self.max_response_length,
            f"min_response_length: {self.min_response_length} leaves no room for an end within max_response_length "
            f"{self.max_response_length}",
        )
        require(self.temperature > 0, f"temperature: must be positive, got {self.temperature}; for the likeliest token "
                "pass --greedy True")  # fmt: skip
        self._validate_search()
        require(
            not self.greedy or self.temperature == 1,
            f"temperature: {self.temperature:g} is not read with --greedy True; leave one of the two out",
        )
        measured = self.token_logprobs or bool(self.reference)
        require(
            measured or self.packing == "on",
            "packing: is for forwards for log-probs; pass --token-logprobs True or --reference, or leave it out",
        )
        if self.format != "jsonl":
            many = self.responses_per_prompt > 1
            require(not many, f"responses_per_prompt: {self.format} holds one answer a prompt; use --format jsonl")
            for name in ("token_logprobs", "reference"):
                require(not getattr(self, name), f"{name}: {self.format} has no place for it; use --format jsonl")
        require(
            not self.greedy or self.responses_per_prompt == 1,
            f"greedy: all {self.responses_per_prompt} responses to a prompt would be the same; sample, or ask for one",
        )
        require(
            self.format != "alpaca_eval" or self.output.endswith(".json"),
            f"output: AlpacaEval reads files that end in .json, got {self.output!r}",
        )
        target = Path(self.output)
        require(not target.exists(), f"output: {target} exists already")
        there = next(p for p in target.absolute().parents if p.exists())
        require(there.is_dir(), f"output: {there} is a file")

    def _validate_search(self) -> None:
        for name in ("beams", "length_penalty"):
            require(getattr(self, name) >= 0, f"{name}: must not be negative, got {getattr(self, name)}")
        for name, default in (("guide_ref", ""), ("guide_scale", 1.0)):
            alone = not self.guide_model and getattr(self, name) != default
            require(not alone, f"{name}: works on a guide; pass --guide-model too, or leave it out")
        require(math.isfinite(self.guide_scale), f"guide_scale: must be a number, got {self.guide_scale}")
        for name in ("beams", "guide_model"):
            on = bool(getattr(self, name)) and self.rollout_engine == "vllm"
            require(not on, f"{name}: vLLM cannot do it; use --rollout-engine transformers")
        if not self.beams:
            require(not self.length_penalty, "length_penalty: ranks beams; pass --beams too, or leave it out")
            return
        require(not self.greedy, "greedy: beams take the likeliest responses already; leave one of the two out")
        require(self.temperature == 1, f"temperature: beams rank by log-probs at temperature 1, got {self.temperature}")
        require(
            self.responses_per_prompt <= self.beams,
            f"responses_per_prompt: {self.beams} beams end in that many responses at most, got "
            f"{self.responses_per_prompt}",
        )

    @property
    def guided(self) -> bool:
        return bool(self.guide_model and self.guide_scale)

    @property
    def name(self) -> str:
        return self.generator or "_".join(Path(self.model).parts[-2:]).strip("/._")


@dataclass(frozen=True)
class Prompt:
    """One row of the data, ready to answer."""

    row: dict[str, Any]
    text: str
    """The user's words: the prompt as a string, or the last message."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    text: str
    ids: list[int]
    truncated: bool
    logps: list[float] = dataclasses.field(default_factory=list)
    """Of a guided response's tokens, nats, as they were drawn; else empty."""
    scores: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What jsonl writes of its tokens."""

    @property
    def tokens(self) -> int:
        return len(self.ids)


def alpaca_eval(prompts: Sequence[Prompt], answers: Sequence[Answer], name: str) -> str:
    """A JSON list; AlpacaEval matches rows by `instruction`."""
    rows = [
        {"instruction": p.text, "output": a.text, "generator": name, "dataset": p.row.get("dataset", "unknown")}
        for p, a in zip(prompts, answers, strict=True)
    ]
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def arena_hard(prompts: Sequence[Prompt], answers: Sequence[Answer], name: str) -> str:
    """JSON lines of Arena-Hard-Auto, version 0.1 or 2 by the questions' columns; tokens are the model's own."""
    lines = []
    for p, a in zip(prompts, answers, strict=True):
        key = "uid" if "uid" in p.row else "question_id"
        mark = hashlib.sha256(f"{name}/{p.row[key]}".encode()).hexdigest()[:22]
        if key == "uid":
            messages = [{"role": "user", "content": p.text}, {"role": "assistant", "content": {"answer": a.text}}]
            row = {"uid": p.row[key], "ans_id": mark, "model": name, "messages": messages, "tstamp": time.time(),
                   "metadata": {"token_len": a.tokens}}  # fmt: skip
        else:
            turns = [{"content": a.text, "token_len": a.tokens}]
            row = {"question_id": p.row[key], "answer_id": mark, "model_id": name,
                   "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}  # fmt: skip
        lines.append(json_line(row))
    return "".join(lines)


def jsonl(prompts: Sequence[Prompt], answers: Sequence[Answer], name: str) -> str:
    """JSON lines with what is known of each response; those to one prompt follow one another."""
    each = len(answers) // len(prompts)
    lines = []
    for k, a in enumerate(answers):
        i, j = divmod(k, each)
        number = {"response_index": j} if each > 1 else {}
        row = {"prompt": prompts[i].text, "response": a.text, "generator": name, "tokens": a.tokens}
        lines.append(json_line({"row": i, **number, **row, "truncated": a.truncated, **a.scores}))
    return "".join(lines)


FORMATS: dict[str, Callable[[Sequence[Prompt], Sequence[Answer], str], str]] = {
    "alpaca_eval": alpaca_eval,
    "arena_hard": arena_hard,
    "jsonl": jsonl,
}


def generate(config: GenerateConfig) -> Path:
    """Answers all prompts and writes the file. Raises ConfigError, with nothing written, on input that cannot work."""
    config.validate()
    model = load_config(config.model, "model")
    check_weights(config.model, "model")
    tokenizer = load_tokenizer(config.model)
    template = load_template(config.chat_template, tokenizer, config.template_date)
    check_vocabulary(tokenizer, model, "model")
    check_template(config.model, template, "model")
    stop_ids = stop_token_ids(config.model, tokenizer, template)
    check_min_length(config.min_response_length, stop_ids, model)
    positions = getattr(model.get_text_config(), "max_position_embeddings", 0)
    fingerprint, prompts = _prompts(config, tokenizer, template, positions)
    for name in ("reference", "guide_model", "guide_ref"):
        if getattr(config, name):
            _check_other(config, name, model, template, max(len(p.ids) for p in prompts))
    settings = dataclasses.asdict(config) | {"data": fingerprint, "template": template.hash}
    for free in ("output", "chunk", "generator", "format", "rollout_tokens", "token_logprobs", "reference", "packing"):
        del settings[free]
    answers = _Partial(Path(config.output + ".partial"), settings)
    done = answers.read()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    rollouts = RTOConfig(
        dtype=config.dtype, packing=config.packing, rollout_engine=config.rollout_engine,
        rollout_tokens=config.rollout_tokens, max_response_length=config.max_response_length,
        max_prompt_length=max((len(p.ids) for p in prompts), default=1),
    )  # fmt: skip
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    engine, sampler = _sampler(config, rollouts, device, pad)
    temperature = GREEDY if config.greedy else config.temperature
    sampling = Sampling(config.max_response_length, temperature, stop_ids, config.min_response_length)
    columns = (TextColumn("answers"), *Progress.get_default_columns()[1:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        wanted = [divmod(k, config.responses_per_prompt) for k in range(len(prompts) * config.responses_per_prompt)]
        bar = progress.add_task("answers", total=len(wanted), completed=len(done))
        for start in range(len(done), len(wanted), config.chunk):
            requests = [
                Request(prompts[i].ids, i, i, j, sample_seed(config.seed, i, 0, j))
                for i, j in wanted[start : start + config.chunk]
            ]
            rollout = sampler(requests, sampling, lambda tokens, ended: progress.advance(bar, ended))
            ids = [r.tolist() for r in rollout.responses()]
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            guided = rollout.sampler_logp.split(rollout.response_lens.tolist()) if config.guided else [None] * len(ids)
            new = [
                Answer(text.strip(), r, cut, [] if logps is None else logps.tolist())
                for text, r, cut, logps in zip(texts, ids, rollout.truncated.tolist(), guided, strict=True)
            ]
            answers.add(new)
            done += new
    if config.token_logprobs or config.reference:
        engine.sleep()
        done = _scored(config, rollouts, device, [prompts[i] for i, _ in wanted], done)
    write_atomic(config.output, FORMATS[config.format](prompts, done, config.name))
    answers.path.unlink()
    cut = sum(a.truncated for a in done)
    print(f"{len(done)} answers, {cut} cut at {config.max_response_length} tokens: {config.output}")
    if config.reference:
        print(f"KL to {config.reference}: {sum(a.scores['kl'] for a in done) / len(done):.4f} nats a response")
    return Path(config.output)


def _sampler(config: GenerateConfig, rollouts: RTOConfig, device: torch.device, pad: int) -> tuple[Any, Callable]:
    """(the engine, what it is asked by: a function of requests, sampling and progress that returns a Rollout)."""
    if not (config.beams or config.guided):
        engine = make_engine(rollouts, config.model, device, DTYPES[config.dtype], pad)
        _push_merged(engine, config.model, "model", config)
        return engine, engine.generate
    from rto_fast.rollout.beams import beam_search
    from rto_fast.rollout.guided import GuidedEngine
    from rto_fast.rollout.transformers_engine import TransformersEngine

    loading = (device, DTYPES[config.dtype], pad, config.rollout_tokens)
    own: TransformersEngine
    if not config.guided:
        own = TransformersEngine(base_of(config.model), *loading)
    else:
        reference = "" if config.guide_ref == config.model else config.guide_ref
        own = guided = GuidedEngine(
            base_of(config.model), *loading, guide=base_of(config.guide_model), scale=config.guide_scale,
            reference=base_of(reference) if reference else "",
        )  # fmt: skip
        for guide, name in zip(guided.guides, ("guide_model", "guide_ref"), strict=False):
            _push_merged(guide, getattr(config, name), name, config)
    _push_merged(own, config.model, "model", config)
    if not config.beams:
        return own, own.generate
    return own, lambda requests, sampling, progress: beam_search(
        own, requests, sampling, config.beams, config.length_penalty, progress
    )


def _push_merged(engine: Any, path: str, argument: str, config: GenerateConfig) -> None:
    """Gives an engine that holds an adapter's base the weights with the adapter merged."""
    if read_adapter(path, argument):
        merged = load_policy(path, dtype=DTYPES[config.dtype], attention="sdpa", argument=argument)
        engine.push(full_parameters(merged), version=0)


def _check_other(config: GenerateConfig, name: str, model: Any, template: ChatTemplate, longest: int) -> None:
    """ConfigError where the setting `name` holds a model that cannot read the model's tokens.

    longest: of a prompt, tokens.
    """
    path = getattr(config, name)
    other = load_config(path, name)
    ours, theirs = (c.get_text_config().vocab_size for c in (model, other))
    require(
        ours == theirs,
        f"{name}: {path!r} has a vocabulary of {theirs} tokens, the model's has {ours}; the two are compared token by "
        "token",
    )
    check_weights(path, name)
    check_template(path, template, name)
    check_max_length(longest + config.max_response_length, other, "max_response_length with the longest prompt")


def _scored(
    config: GenerateConfig, rollouts: RTOConfig, device: torch.device, prompts: Sequence[Prompt], answers: list[Answer]
) -> list[Answer]:
    """The answers with the log-probs of their tokens; prompts: that of each answer."""
    longest = rollouts.max_prompt_length + rollouts.max_response_length
    placement, loading = place(rollouts, device, config.rollout_tokens, longest)
    sequences = [torch.tensor([*p.ids, *a.ids]) for p, a in zip(prompts, answers, strict=True)]
    lens = [len(p.ids) for p in prompts]

    @torch.inference_mode()
    def logps(path: str, argument: str) -> list[list[float]]:
        """[answer][token] nats."""
        model, out = load_policy(path, argument=argument, **loading).to(device).eval(), [[0.0]] * len(answers)
        for index, batch in placement.micro(sequences, lens):
            for i, values in zip(index, model(batch).split(batch.cu_responses.diff().tolist()), strict=True):
                out[i] = values.tolist()
        return out

    ours = [a.logps for a in answers] if config.guided else logps(config.model, "model")
    scores = [{"token_ids": a.ids, "logprobs": own} for a, own in zip(answers, ours, strict=True)]
    if config.reference:
        for score, own, other in zip(scores, ours, logps(config.reference, "reference"), strict=True):
            score |= {"ref_logprobs": other, "kl": sum(own) - sum(other)}
    return [dataclasses.replace(a, scores=score) for a, score in zip(answers, scores, strict=True)]


class _Partial:
    """Finished answers on disk, one JSON line each behind a line of settings."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))

    def read(self) -> list[Answer]:
        """The answers so far; ConfigError where they are of other settings."""
        rows = read_rows(self.path)
        if not rows:
            return []
        changed = [k for k in self.settings if rows[0].get(k) != self.settings[k]]
        require(not changed, f"output: {self.path} holds answers of other settings ({', '.join(changed)}); delete it, "
                "or choose another --output")  # fmt: skip
        return [Answer(**row) for row in rows[1:]]

    def add(self, answers: Sequence[Answer]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mend(self.path)
        head = "" if self.path.exists() and self.path.stat().st_size else json_line(self.settings)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(head + "".join(json_line(dataclasses.asdict(a)) for a in answers))


def _prompts(config: GenerateConfig, tokenizer: Any, template: Any, positions: int) -> tuple[str, list[Prompt]]:
    """(fingerprint of the data, its prompts); DataError names the first row that cannot be answered."""
    fingerprint, read = open_source("data", config.data, config.data_split)
    table = read(config.max_rows)
    key = _columns(table, config)
    out = []
    for i, raw in enumerate(table.rows):
        line = raw["line"] if table.as_text else 0
        at = f"data: {config.data!r}, " + (f"line {line}" if line else f"row {i} (from 0)")
        try:
            row = row_of(raw, table.as_text, table.literal)
            if key == "turns":
                row = row | {"turns": _first_turn(row.get("turns"), at)}
            for kept in KEPT & row.keys():
                check_text(row[kept], kept)
            found = prompt_row(row, [key, ""], tokenizer, template)
        except BadRow as error:
            raise DataError(f"{at}: {error.detail} ({error.reason})") from error
        except jinja2.TemplateError as error:
            raise DataError(f"{at}: the chat template refuses the conversation: {error}") from error
        if config.format == "arena_hard" and not row.get("uid", row.get("question_id")):
            raise DataError(f"{at}: no question_id or uid, by which Arena-Hard knows its questions")
        ids = tuple(found["prompt_ids"])
        if positions and len(ids) + config.max_response_length > positions:
            raise DataError(
                f"{at}: a prompt of {len(ids)} tokens and max_response_length {config.max_response_length} are more "
                f"than the model's {positions} positions; lower --max-response-length"
            )
        prompt = row[key] if config.format == "alpaca_eval" else json.loads(found["prompt"])
        out.append(Prompt(row, prompt if isinstance(prompt, str) else prompt[-1]["content"], ids))
    return fingerprint, out


def _columns(table: Table, config: GenerateConfig) -> str:
    """The prompt's column."""
    if config.format == "arena_hard" and not {"uid", "question_id"} & set(table.columns):
        raise DataError(f"data: {config.data!r} has neither question_id nor uid, by which Arena-Hard knows its "
                        f"questions; it has {', '.join(table.columns)}")  # fmt: skip
    keys = ("turns", *PROMPT_KEYS) if config.prompt_key == "auto" else (config.prompt_key,)
    return table.need(*keys, flag="prompt-key")


def _first_turn(turns: Any, at: str) -> str:
    """The question of Arena-Hard 0.1's one turn."""
    if not (isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict) and turns[0].get("content")):
        raise DataError(f"{at}: 'turns' must be a list of one {{\"content\": text}}, got {str(turns)[:60]!r}")
    return turns[0]["content"]


if __name__ == "__main__":
    cli.main(GenerateConfig(), "rto_fast.generate:generate")
