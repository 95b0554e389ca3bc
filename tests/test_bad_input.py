"""Every bad input gives one message that names the setting, before any work, with nothing written."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import pytest
from loop_helpers import small_run, write_rows
from recipe_helpers import RECIPES, flags_of, run_deepspeed, run_recipe

REFUSED, STOPPED = 2, 3

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def settings(tiny, tmp_path):
    """Recipe -> settings that would run; every case below changes some of them."""
    small = {"dtype": "fp32", "output_dir": tmp_path / "out", "data_cache": False, "data_workers": 1}
    supervised = small | {"model": tiny.policy, "data": tiny.pairs, "data_split": "train", "eval_split": "",
                          "max_length": 64, "batch": 8, "gradient_checkpointing": False}  # fmt: skip
    rto = small_run(tiny, tmp_path / "out") | {"prompt_key": "auto"}
    return {
        "sft_llama3.py": supervised | {"data": tiny.texts},
        "rm_llama3.py": supervised,
        "dpo_llama3.py": supervised,
        "rto_llama3.py": rto,
        "ppo_llama3.py": {k: v for k, v in rto.items() if k != "dpo_model"},
    }


@pytest.fixture
def run(settings, monkeypatch, capfd):
    """run(recipe, **changed settings) -> (exit code, stdout, stderr)."""

    def start(recipe: str, *extra: str, **changed):
        capfd.readouterr()
        code = run_recipe(recipe, [*flags_of(settings[recipe] | changed), *extra], monkeypatch)
        return code, *capfd.readouterr()

    return start


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file under the folder; None where it does not exist."""
    if not folder.exists():
        return None
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def message_of(stderr: str) -> str:
    """The one error in `stderr`, which must hold no traceback."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    assert stderr.rstrip().endswith(lines[0]), f"the message is not the last word, or has more than one line: {stderr}"
    return lines[0]


@pytest.fixture
def refused(run, settings, monkeypatch):
    """refused(recipe, message, **changed): exit code 2, the message (a regex), no model loaded, nothing written."""
    import transformers

    def loaded(*_, **__):
        raise AssertionError("a model was loaded before the input was refused")

    def check(recipe: str, message: str, *extra: str, **changed) -> None:
        folder = Path(changed.get("output_dir", settings[recipe]["output_dir"]))
        before = contents(folder)
        with monkeypatch.context() as patch:
            for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
                patch.setattr(getattr(transformers, name), "from_pretrained", loaded)
            code, _, stderr = run(recipe, *extra, **changed)
        found = message_of(stderr)
        assert re.search(message, found), found
        assert code == REFUSED
        assert contents(folder) == before

    return check


# ------------------------------------------------------------------------------------------------ flags

FLAGS = {
    "a misspelt flag": ("rto_llama3.py", ["--polcy", "x"], r"unknown flag --polcy; did you mean --policy\?"),
    "a flag of another stage": ("rm_llama3.py", ["--beta1=1"], r"unknown flag --beta1; .*--help"),
    "an underscored misspelling": ("dpo_llama3.py", ["--adam_beta", "1"], r"--adam_beta; did you mean --adam-betas\?"),
    "a word that is no flag": ("sft_llama3.py", ["extra"], r"unknown flag extra; --help"),
    "stage 0 in bf16": ("rto_llama3.py", ["--zero-stage", "0", "--dtype", "bf16"], r"zero_stage: .*bf16.*--dtype fp32"),
    "stage 0 in bf16, supervised": ("dpo_llama3.py", ["--zero-stage", "0", "--dtype", "bf16"], r"zero_stage: "),
    "offload without ZeRO": ("rm_llama3.py", ["--zero-stage", "0", "--offload", "True"], r"offload: needs ZeRO"),
    "batches that do not divide": ("rto_llama3.py", ["--train-batch", "3"], r"train_batch: 3 does not divide the 8"),
    "a train batch over the rollout": ("ppo_llama3.py", ["--train-batch", "16"], r"train_batch: 16 does not divide"),
    "an empty batch": ("sft_llama3.py", ["--batch", "0"], r"batch: must be at least 1, got 0"),
    "no learning rate": ("rm_llama3.py", ["--lr", "0"], r"lr: must be positive, got 0"),
    "a negative learning rate": ("rto_llama3.py", ["--policy-lr", "-1"], r"policy_lr: must be positive, got -1"),
    "no learning rate of the critic": ("ppo_llama3.py", ["--critic-lr", "0"], r"critic_lr: must be positive, got 0"),
    "an infinite learning rate": ("sft_llama3.py", ["--lr", "inf"], r"lr: must be finite, got inf"),
    "a weight that is no number": ("rto_llama3.py", ["--reward-weight", "nan"], r"reward_weight: must be finite"),
    "a beta of 1": ("dpo_llama3.py", ["--adam-betas", "0.9", "1"], r"adam_betas: must lie in \[0, 1\), got \(0.9, 1"),
    "a negative warm-up": ("rto_llama3.py", ["--critic-warmup", "-1"], r"critic_warmup: must not be negative"),
    "negative retries": ("rto_llama3.py", ["--reward-retries", "-1"], r"reward_retries: must not be negative"),
    "no time": ("rto_llama3.py", ["--reward-timeout-s", "0"], r"reward_timeout_s: must be positive, got 0"),
    "negative samples": ("rto_llama3.py", ["--report-samples", "-1"], r"report_samples: must not be negative"),
    "negative exports": ("rto_llama3.py", ["--export-every", "-1"], r"export_every: must not be negative"),
    "a folder for a template": ("rm_llama3.py", ["--chat-template", "."], r"chat_template: no file '\.'; give auto"),
    "a negative coefficient": ("rto_llama3.py", ["--beta2", "-1"], r"beta2: must not be negative, got -1"),
    "an evaluation on what is trained on": (
        "rm_llama3.py", ["--eval-split", "train"], r"eval_split: 'train' is data_split too",
    ),
    "no data": ("rto_llama3.py", ["--data", ""], r"data: no data set given; pass --data"),
    "no policy": ("ppo_llama3.py", ["--policy", ""], r"policy: no model given; pass --policy"),
    "no DPO model": ("rto_llama3.py", ["--dpo-model", ""], r"dpo_model: beta1 > 0 needs .*--dpo-model, or --beta1 0"),
    "no reward": ("rto_llama3.py", ["--reward-model"], r"reward_model: no reward source; pass --reward-mod"),
    "too many weights": ("rto_llama3.py", ["--reward-weight", "1", "2"], r"reward_weight: 2 weights for 1 reward"),
    "a critic from no reward model": (
        "rto_llama3.py", ["--reward-model", "--reward-fn", "json:dumps", "--critic", "reward"],
        r"critic: 'reward' needs a reward model",
    ),
    "a length over the positions": ("rm_llama3.py", ["--max-length", "129"], r"max_length: 129 .* 128 positions"),
    "an RTO length over the positions": (
        "rto_llama3.py", ["--max-prompt-length", "120"],
        r"max_prompt_length \+ max_response_length: 132 tokens exceed the model's 128 positions",
    ),
    "no such model": ("dpo_llama3.py", ["--model", "/no/such/model"], r"model: no model at '/no/such/model'"),
    "no such reward model": ("rto_llama3.py", ["--reward-model", "/no/such"], r"reward_model: no model at '/no/such'"),
    "no such reference": ("dpo_llama3.py", ["--reference", "/no/such"], r"reference: no model at '/no/such'"),
    "no such template": ("rm_llama3.py", ["--chat-template", "x.jinja"], r"chat_template: no file 'x.jinja'"),
    "a reward function without a colon": ("ppo_llama3.py", ["--reward-fn", "json"], r"reward_fn: 'json' is not modul"),
    "an unknown module": ("rto_llama3.py", ["--reward-fn", "jsom:dumps"], r"reward_fn: .*jsom.*did you mean .*json"),
    "an unknown function": ("rto_llama3.py", ["--reward-fn", "json:dump5"], r"reward_fn: json has no 'dump5'; did yo"),
    "a function of other arguments": ("rto_llama3.py", ["--reward-fn", "json:loads"], r"reward_fn: json:loads.*cannot"),
    "a missing function file": ("rto_llama3.py", ["--reward-fn", "no/f.py:g"], r"reward_fn: file no/f.py .*not exist"),
    "a shared engine that is not vLLM's": (
        "rto_llama3.py", ["--vllm-tensor-parallel", "2"],
        r"vllm_tensor_parallel: is for --rollout-engine vllm, not 'auto'",
    ),
    "an engine for more ranks than there are": (
        "rto_llama3.py", ["--rollout-engine", "vllm", "--vllm-tensor-parallel", "2"],
        r"vllm_tensor_parallel: 2 does not divide the 1 ranks of this launch",
    ),
    "over-sampling from servers": (
        "ppo_llama3.py", ["--rollout-engine", "vllm-serve", "--rollout-oversample", "0.5"],
        r"rollout_oversample: servers answer in no fixed order",
    ),
    "less than no over-sampling": (
        "rto_llama3.py", ["--rollout-oversample", "-0.5"], r"rollout_oversample: must not be negative, got -0.5",
    ),
    "a URL that is none": ("rto_llama3.py", ["--reward-url", "ftp://x"], r"reward_url: 'ftp://x' must start with http"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name, refused):
    recipe, flags, message = FLAGS[name]
    refused(recipe, message, *flags)


@pytest.mark.parametrize(("flag", "value"), [("--seed", "x"), ("--dtype", "fp8"), ("--zero-stage", "4")])
def test_value_of_another_type(run, settings, flag, value):
    """tyro's own message, in a box."""
    code, _, stderr = run("rm_llama3.py", flag, value)
    assert code == REFUSED
    assert flag in stderr
    assert value in stderr
    assert "Traceback" not in stderr
    assert not settings["rm_llama3.py"]["output_dir"].exists()


def test_function_file_that_fails(refused, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    refused("rto_llama3.py", r"reward_fn: importing .*broken.py raised ModuleNotFoundError",
            reward_fn=f"{tmp_path}/broken.py:f")  # fmt: skip


def test_wandb_that_is_not_installed(refused, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    refused("rto_llama3.py", "wandb_project: wandb is not installed", wandb_project="p")
    refused("rm_llama3.py", "wandb_project: wandb is not installed", wandb_project="p")


@pytest.mark.parametrize("recipe", RECIPES)
def test_help(recipe, monkeypatch, capsys):
    """Every field with its default and what it means, under `deepspeed` too, which adds a flag of its own."""
    monkeypatch.setenv("COLUMNS", "400")
    assert run_recipe(recipe, ["--local_rank=0", "--help"], monkeypatch) == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for name, default, meaning in fields_of(recipe, monkeypatch):
        flag = "--" + name.replace("_", "-")
        shown = shlex.join(map(str, default if isinstance(default, tuple) else (default,)))
        entry = re.search(rf"{flag} (?:\[?[A-Z{{]).*?\(default:(.*?)\)", text)
        assert entry, f"{flag} is not in the help"
        assert entry[1].strip() == shown, f"{flag}: default"
        assert meaning, f"{flag}: no docstring"
        assert " ".join(meaning.split()).replace("`", "") in entry[0].replace("`", ""), f"{flag}: its meaning"


def fields_of(recipe: str, monkeypatch) -> list[tuple[str, object, str]]:
    """(name, the recipe's default, docstring) of every setting, read from the sources."""
    import dataclasses
    import runpy

    path = Path(__file__).parents[1] / "recipes" / recipe
    monkeypatch.setattr(sys, "argv", [str(path)])
    space = runpy.run_path(str(path), run_name="recipe")
    defaults = space["DEFAULTS"] if "DEFAULTS" in space else space["demo"].DemoConfig()
    meanings = {}
    for cls in reversed(type(defaults).__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, after in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                meanings[field.target.id] = after.value.value
    return [(f.name, getattr(defaults, f.name), meanings.get(f.name, "")) for f in dataclasses.fields(defaults)]


# ------------------------------------------------------------------------------------------------- rows

GOOD = {"prompt": "Once there was a fox.", "chosen": "It ran to the hill.", "rejected": "It found a lamp."}
HALF = GOOD | {"prompt": "Once \ud83e there was a fox."}
"""JSON can spell half a character; no tokenizer takes it."""
BAD_ROWS = {
    "missing key": ({"prompt": "A fox.", "chosen": "It ran."}, r"'rejected' is missing \(missing key"),
    "not text": (GOOD | {"chosen": 7}, r"'chosen' is int where text was expected: '7' \(not text"),
    "empty text": (GOOD | {"rejected": "  "}, r"'rejected' is empty \(empty text"),
    "chosen = rejected": (
        GOOD | {"rejected": GOOD["chosen"]},
        r"'chosen' and 'rejected' are the same \(chosen = rejected",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row(kind, refused, tmp_path):
    row, message = BAD_ROWS[kind]
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD, row, row])
    for recipe in ("rm_llama3.py", "dpo_llama3.py"):
        refused(recipe, rf"data: '{path}', line 3: {message}; the first of 2 .* in 4\); mend the data, or pass "
                        r"--invalid-rows skip", data=path)  # fmt: skip


def test_half_a_character(refused, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, HALF])
    refused("rm_llama3.py", rf"data: '{path}', line 2: 'prompt' holds '\\ud83e' at character 5", data=path)


def test_files_that_cannot_be_read(refused, tmp_path, tiny, monkeypatch):
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe{{ messages }}")
    refused("rm_llama3.py", r"chat_template: .*binary.jinja' is no readable UTF-8 text", chat_template=binary)
    real = Path.open

    def locked(path, *rest, **options):
        if str(path) == tiny.pairs:
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **options)

    monkeypatch.setattr(Path, "open", locked)  # root reads everything, so that modes would not do
    refused("rm_llama3.py", rf"data: '{tiny.pairs}' cannot be read: Permission denied")


def test_bad_prompt_and_response(refused, tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "A fox."}, {"prompt": ""}])
    refused("rto_llama3.py", rf"data: '{path}', line 2: 'prompt' is empty", data=path)
    path = write_rows(tmp_path / "texts.jsonl", [{"prompt": "A fox.", "response": "It ran."}, {"prompt": "A cat."}])
    refused("sft_llama3.py", rf"data: '{path}', line 2: 'response' is missing", data=path)
    refused("rto_llama3.py", r"data: .* has no column 'promt'; .*did you mean --prompt-key prompt\?",
            data=path, prompt_key="promt")  # fmt: skip


def test_bad_rows_skipped_and_counted(run, tmp_path):
    rows = [GOOD, *(row for row, _ in BAD_ROWS.values()), GOOD | {"chosen": "It ran. " * 40}, *[GOOD] * 3]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    code, stdout, _ = run("rm_llama3.py", data=path, invalid_rows="skip", eval_fraction=0)
    assert code == 0
    assert (
        f"data {path}: 9 rows, 4 kept, 5 skipped (chosen = rejected: 1, empty text: 1, longer than the limit: 1, "
        "missing key: 1, not text: 1)\n"
    ) in stdout
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_row_over_the_limit(refused, tiny, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"chosen": "It ran. " * 40}])
    refused("rm_llama3.py", rf"data: '{path}', line 2: \d+ tokens, over max_length 64 \(the first of 1 .*--max-length, "
            "or pass --overlong skip or truncate", data=path, overlong="refuse")  # fmt: skip
    refused("dpo_llama3.py", r"data: no usable row in .*longer than the limit: 2", data=path, max_length=4)
    refused("rto_llama3.py", r"data: .* over max_prompt_length 2 ", max_prompt_length=2, overlong="refuse")


def test_file_that_is_missing_or_malformed(refused, tiny, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(GOOD) + "\n{not json\n")
    for recipe in ("rm_llama3.py", "rto_llama3.py", "sft_llama3.py"):
        near = re.escape(str(tmp_path / "pairs.jsonl"))
        refused(
            recipe, rf"data: no file or folder '.*pears.jsonl'; did you mean '{near}'\?", data=tmp_path / "pears.jsonl"
        )
        refused(recipe, r"data: '.*pairs.jsonl', line 2, column 2: malformed JSON", data=tmp_path / "pairs.jsonl")
    for name, text, message in (
        ("empty.jsonl", "", "is empty"),
        ("rows.txt", "a", "has unknown file type '.txt'; expected .jsonl"),
        ("list.jsonl", "[1, 2]\n", "line 1: expected an object of columns, found a JSON list"),
        ("pairs.csv", 'prompt,chosen\na,b,c\n', "line 2: 3 fields where the header has 2"),
        ("pairs.parquet", "no parquet", "is no readable Parquet file"),
        ("bytes.jsonl", "\udcff", "line 1: not UTF-8"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        refused("rm_llama3.py", rf"data: .*{re.escape(name)}.*{re.escape(message)}", data=tmp_path / name)
    refused("rm_llama3.py", r"eval_data: no file or folder", eval_data=tmp_path / "held_out.jsonl")


# ----------------------------------------------------------------------------------------------- models


@pytest.fixture
def altered(tmp_path):
    """altered(model folder, **config values) -> a copy whose config.json says otherwise."""

    def copy(source: str, **values) -> Path:
        folder = tmp_path / f"altered{len(list(tmp_path.glob('altered*')))}"
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    return copy


def test_tokenizer_that_does_not_fit_the_model(refused, tiny, altered):
    smaller = altered(tiny.policy, vocab_size=50)
    for recipe in ("sft_llama3.py", "rm_llama3.py", "dpo_llama3.py"):
        refused(recipe, r"model: the tokenizer has ids up to 86, the model has 50", model=smaller)
    refused("rto_llama3.py", r"policy: the tokenizer has ids up to 86, the model has 50", policy=smaller)
    refused("rto_llama3.py", r"reward_model: the tokenizer has ids up to 86, the model has 50",
            reward_model=altered(tiny.reward, vocab_size=50))  # fmt: skip
    no_tokenizer = altered(tiny.policy)
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    refused("rm_llama3.py", rf"model: no tokenizer in '{no_tokenizer}'", model=no_tokenizer)


def test_vocabulary_of_another_size(refused, tiny, altered):
    larger = altered(tiny.dpo, vocab_size=200)
    message = rf"'{larger}' has a vocabulary of 200 tokens, the (policy|model)'s has 87"
    refused("dpo_llama3.py", f"reference: {message}", reference=larger)
    for argument in ("dpo_model", "dpo_ref", "reference"):
        refused("rto_llama3.py", f"{argument}: {message}", **{argument: larger})


def test_fewer_positions_than_the_policy(refused, tiny, altered):
    refused("rto_llama3.py", r"\(dpo_model\): 28 tokens exceed the model's 16 positions",
            dpo_model=altered(tiny.dpo, max_position_embeddings=16))  # fmt: skip
    refused("rto_llama3.py", r"\(reward_model\): 28 tokens exceed the model's 16 positions",
            reward_model=altered(tiny.reward, max_position_embeddings=16))  # fmt: skip
    refused("dpo_llama3.py", r"\(reference\): 64 tokens exceed the model's 16 positions",
            reference=altered(tiny.dpo, max_position_embeddings=16))  # fmt: skip


def test_template_of_another_run(refused, tiny, altered):
    other = altered(tiny.policy)
    (other / "rto_template.json").write_text(json.dumps({"hash": "a" * 64, "kind": "jinja"}))
    message = rf"'{other}' was trained with chat template a{{64}}, this run uses [0-9a-f]{{64}}; use the same --chat-te"
    for recipe in ("sft_llama3.py", "rm_llama3.py", "dpo_llama3.py"):
        refused(recipe, f"model: {message}", model=other)
    refused("dpo_llama3.py", f"reference: {message}", reference=other)
    for argument in ("policy", "dpo_model", "dpo_ref", "reference"):
        refused("rto_llama3.py", f"{argument}: {message}", **{argument: other})
    reward = altered(tiny.reward)
    shutil.copy(other / "rto_template.json", reward)
    refused("rto_llama3.py", r"reward_model: .* was trained with chat template a+", reward_model=reward)


def test_weights_that_are_not_there(refused, tiny, altered):
    """No weights, a torn file, a shard that the index names and the folder lacks: found before any data is read."""
    none, torn, lacking = (altered(tiny.dpo) for _ in range(3))
    (none / "model.safetensors").unlink()
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder, message in (
        (none, r"holds no weights \(\*.safetensors or \*.bin\)"),
        (torn, r"model.safetensors' is no readable safetensors file"),
        (lacking, "lacks model-00001-of-00002.safetensors, which its index names"),
    ):
        refused("sft_llama3.py", rf"model: '{folder}.*{message}", model=folder)
        refused("dpo_llama3.py", rf"reference: '{folder}.*{message}", reference=folder)
        for argument in ("policy", "dpo_model", "dpo_ref", "reference"):
            refused("rto_llama3.py", rf"{argument}: '{folder}.*{message}", **{argument: folder})


def test_weights_in_another_format_that_do_not_load(run, tiny, altered, settings):
    """Only loading can judge them; still one message, and nothing written."""
    folder = altered(tiny.policy)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not tensors")
    code, _, stderr = run("rm_llama3.py", model=folder)
    assert re.search(rf"model: '{folder}' does not load: ", message_of(stderr))
    assert (code, settings["rm_llama3.py"]["output_dir"].exists()) == (REFUSED, False)


def test_reward_model_without_a_head(refused, tiny, altered):
    refused("rto_llama3.py", rf"reward_model: '{tiny.policy}' has no reward head \(looked for score and value_head\)",
            reward_model=tiny.policy)  # fmt: skip
    damaged = altered(tiny.reward)
    (damaged / "model.safetensors").write_bytes(b"not tensors")
    refused("rto_llama3.py", r"reward_model: .*is no readable safetensors file", reward_model=damaged)


def test_no_token_that_ends_a_response(refused, tiny, altered):
    endless = altered(tiny.policy, eos_token_id=None)
    (endless / "generation_config.json").unlink()
    tokenizer = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": None}))
    refused("rto_llama3.py", "no response would ever stop", policy=endless)


# ------------------------------------------------------------------------------- output and checkpoints


def test_output_that_holds_a_run(refused, settings, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    for recipe in settings:
        refused(recipe, rf"output_dir: {out} already holds a run; pass --resume auto .*or another --output-dir")
        refused(recipe, r"output_dir: .*metrics.jsonl is a file", output_dir=out / "metrics.jsonl")
        refused(recipe, r"output_dir: .*metrics.jsonl is a file", output_dir=out / "metrics.jsonl" / "deeper")


def test_checkpoint_of_another_config(refused, run, tmp_path):
    """And of another number of ranks; what is there stays as it was, and with the same settings the run goes on."""
    assert run("rm_llama3.py", save_every=2, epochs=0.5, eval_fraction=0)[0] == 0
    refused("rm_llama3.py", r"resume: .*step-00000004 was written by a run with other settings: lr=1e-06 \(now 0.001\)",
            resume="auto", lr=0.001, epochs=0.5, eval_fraction=0)  # fmt: skip
    state = tmp_path / "out" / "checkpoints" / "step-00000004" / "state.json"
    record = state.read_text()
    state.write_text(record.replace('"world_size": 1', '"world_size": 2'))
    refused("rm_llama3.py", "resume: .* was written by 2 ranks, this run has 1", resume="auto", epochs=0.5,
            eval_fraction=0)  # fmt: skip
    state.write_text(record)


def test_checkpoint_goes_on_with_other_free_settings(run):
    """The twin of the test above: what may change does, so that refusing is no accident."""
    settings = {"epochs": 0.5, "eval_fraction": 0}
    assert run("rm_llama3.py", save_every=2, **settings)[0] == 0
    memory = {"micro_tokens": 64, "gradient_checkpointing": True}
    code, stdout, _ = run("rm_llama3.py", save_every=1, keep_last=1, resume="auto", **settings, **memory)
    assert (code, "from step 4" in stdout) == (0, True)


def test_rto_checkpoint_of_another_config(refused, run):
    assert run("rto_llama3.py", save_every=1, iterations=1)[0] == 0
    refused("rto_llama3.py", r"resume: .*step-00000001 was written by .* other settings: beta1=0.05 \(now 0.2\)",
            resume="auto", iterations=1, beta1=0.2)  # fmt: skip
    refused("rto_llama3.py", r"output_dir: .* already holds a run", iterations=1)


# ------------------------------------------------------------------------------ what stops a running run

REWARDS = '''
"""Reward functions that misbehave."""
import math

calls = [-1]  # the trial before the run

def nan(prompts, responses):
    return [math.nan] * len(responses)

def inf_once(prompts, responses):
    calls[0] += 1
    return [math.inf if calls[0] == 2 else float(len(r)) for r in responses]

def raises(prompts, responses):
    raise KeyError("no such story")

def late(prompts, responses):
    if responses[0] != "A response.":
        raise KeyError("no such story")
    return [0.0] * len(responses)

def leaves(prompts, responses):
    if responses[0] != "A response.":
        raise SystemExit(0)
    return [0.0] * len(responses)

def too_few(prompts, responses):
    return [0.0]

async def later(prompts, responses):
    return [0.0] * len(responses)

def on_one_rank(prompts, responses):
    import os
    if os.environ.get("RANK") == "1":
        raise KeyError("only here")
    return [float(len(r)) for r in responses]
'''


@pytest.fixture
def rewards(tmp_path) -> str:
    """The path of a file of reward functions."""
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return str(path)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stopped(outcome: tuple[int, str, str], message: str) -> None:
    code, _, stderr = outcome
    found = message_of(stderr)
    assert re.search(message, found), found
    assert code == STOPPED


def test_nan_rewards_stop_the_run(run, rewards, tmp_path):
    outcome = run("rto_llama3.py", "--reward-fn", f"{rewards}:nan", iterations=9, max_bad_steps=3, save_every=1)
    stopped(outcome, r"3 bad steps in a row, the last: rollout 3 gave 8 non-finite score values\. .*Look at")
    assert outcome[1].count("warning: skipped: rollout") == 3
    assert [row["bad_steps"] for row in metrics_of(tmp_path / "out")] == [1, 2]
    assert not (tmp_path / "out" / "policy").exists()


def test_infinite_reward_is_skipped_and_counted(run, rewards, tmp_path):
    """One rollout of four: no update comes from it and the run goes on to its end."""
    code, stdout, _ = run("rto_llama3.py", "--reward-fn", f"{rewards}:inf_once", iterations=4, max_bad_steps=2)
    assert code == 0
    assert stdout.count("warning: skipped: rollout 2 gave 8 non-finite score values") == 1
    rows = metrics_of(tmp_path / "out")
    assert [row["bad_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["reward/score"] is None for row in rows] == [False, True, False, False]
    assert ["policy/loss" in row for row in rows] == [True, False, True, True]


def test_reward_function_that_fails_at_once(refused, rewards):
    """It is tried on a made-up response, before any model is loaded."""
    for function, message in (
        ("raises", r"raised at sample 0: KeyError: 'no such story'"),
        ("too_few", "answered 1 scores for 2 responses"),
        ("later", "answered a coroutine, not 2 numbers"),
    ):
        refused("rto_llama3.py", rf"reward_fn: tried on .*: reward function .*rewards.py:{function} {message}",
                "--reward-fn", f"{rewards}:{function}")  # fmt: skip


def test_reward_function_that_fails_in_the_run(run, rewards):
    stopped(run("rto_llama3.py", "--reward-fn", f"{rewards}:late"),
            r"reward function .*rewards.py:late raised at sample \d+: KeyError: 'no such story'")  # fmt: skip
    stopped(run("ppo_llama3.py", "--resume", "auto", "--reward-fn", f"{rewards}:leaves"),
            r"reward function .*rewards.py:leaves raised at sample \d+: SystemExit: 0")  # fmt: skip


def test_remote_reward_without_an_answer(run):
    stopped(run("rto_llama3.py", "--reward-url", "http://127.0.0.1:9/score", "--reward-retries", "0"),
            r"remote reward http://127.0.0.1:9/score: no answer after 1 attempt\(s\).*ConnectError")  # fmt: skip


@pytest.fixture
def poisoned(tiny, tmp_path) -> str:
    """The policy with NaN in its last norm."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny.policy, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("recipe", ["sft_llama3.py", "rm_llama3.py", "dpo_llama3.py"])
def test_nan_losses_stop_a_stage(recipe, run, poisoned, tmp_path):
    outcome = run(recipe, model=poisoned, max_bad_steps=2, epochs=9)
    stopped(outcome, r"2 non-finite steps in a row at step 2; parameters are those before them\. Look at the learning")
    assert [row["train/loss"] for row in metrics_of(tmp_path / "out")] == [None, None]
    assert not (tmp_path / "out" / "model").exists()


def test_policy_of_nans_cannot_sample(run, poisoned):
    stopped(run("rto_llama3.py", policy=poisoned), r"not finite|non-finite")


# -------------------------------------------------------------------------------------------- many ranks


def test_other_ranks_are_quiet(run, monkeypatch):
    """A rank but the first says nothing of what every rank finds, and gives the first time to speak."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    for flags in (["--polcy", "x"], ["--seed", "x"], ["--train-batch", "3"]):
        code, stdout, stderr = run("rto_llama3.py", *flags)
        assert (code, stdout, stderr) == (REFUSED, "", "")
    assert len(waited) == 3
    assert min(waited) >= 1


def test_two_ranks_refuse_together(settings, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"chosen": ""}])
    flags = flags_of(settings["rm_llama3.py"] | {"data": path})
    result = run_deepspeed("rm_llama3.py", flags, ranks=2)
    assert result.returncode == REFUSED, result.output
    assert result.output.count("error: ") == 1, result.output
    assert f"error: data: '{path}', line 2: 'chosen' is empty" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_error_of_one_rank_stops_both(settings, rewards, tmp_path):
    """The reward function fails on rank 1 alone: its message is printed, once, and nobody waits for ever."""
    flags = flags_of(settings["rto_llama3.py"] | {"reward_fn": f"{rewards}:on_one_rank"})
    result = run_deepspeed("rto_llama3.py", flags, ranks=2)
    assert result.returncode == STOPPED, result.output
    assert result.output.count("error: ") == 1, result.output
    assert "KeyError: 'only here'" in result.output
    assert "Traceback" not in result.output
