"""Plants faults in copies of the kernels, one at a time, and sees whether the kernel tests notice.

    python tests/kernels/mutants.py                  all of them (make mutants)
    python tests/kernels/mutants.py --match factor   those whose name contains the word

A fault is a line of a kernel changed into a wrong one, such as a slip of the hand would leave: a scale left out, a tail
dropped, a split too few, another row's number. The tests named beside it run against the copy, most of them under
Triton's interpreter, and must fail. A mutant that survives, or whose line is gone from the source, ends this with exit
status 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    name: str
    file: str
    line: str
    fault: str
    tests: str  # files of tests/kernels, without test_ and .py, apart by blanks
    interpret: bool = True  # whether the tests run under Triton's interpreter


LINEAR = "confident_tokens linear_logprob"
PPO = "confident_tokens linear_ppo"
# fmt: off
MUTANTS = [
    # The forward pass over the vocabulary.
    Mutant("forward: the tail of the vocabulary counts", "linear_forward", "tl.where((cols < vocab)[None, :], acc, NEG_INF)", "acc", LINEAR),
    Mutant("forward: the last tile of a split dropped", "linear_forward", "range(split * PER_SPLIT, tiles_end)", "range(split * PER_SPLIT, tiles_end - 1)", LINEAR),
    Mutant("forward: the temperature left out of the exponent", "linear_forward", "z = (z - base[:, None]) * scale", "z = (z - base[:, None]) * LOG2E", LINEAR),
    Mutant("forward: what came before is not rescaled", "linear_forward", "total = total * decay + tl.sum(e, 1)", "total = total + tl.sum(e, 1)", LINEAR),
    Mutant("forward: kept probabilities a tenth too small", "linear_forward", "store_block(saved, e, row0, col0, rows, kept_columns, stride_saved, TMA)\n        r =", "store_block(saved, e * 0.9, row0, col0, rows, kept_columns, stride_saved, TMA)\n        r =", LINEAR),
    Mutant("forward: the shift of the part before", "linear_forward", "base *= scale", "base = peak * scale", LINEAR),
    Mutant("merge: a split too few", "linear_forward", "for split in range(SPLITS):", "for split in range(SPLITS - 1):", LINEAR),
    Mutant("merge: the largest of the splits, not their sum", "linear_forward", "total = total * mine + their_total * theirs", "total = tl.maximum(total * mine, their_total * theirs)", LINEAR),
    Mutant("merge: entropy without what the shift moved", "linear_forward", "weighted += theirs * (their_weighted + their_total * tl.maximum(their_peak - base, FLOOR))", "weighted += theirs * their_weighted", LINEAR),
    Mutant("by-products: squares rescaled once alone", "linear_forward", "squares = squares * decay * decay + tl.sum(e * e, 1)", "squares = squares * decay + tl.sum(e * e, 1)", "linear_logprob"),
    Mutant("by-products: of equals the last", "linear_forward", "best = tl.where(theirs > highest, column, best)", "best = tl.where(theirs >= highest, column, best)", "linear_logprob"),
    Mutant("blocks: every block's parts stand at the first one's", "linear_blocks", "split = column_start // SPAN + span", "split = span", "linear_blocks"),
    # The backward pass.
    Mutant("backward: 1 − p from the log-sum-exp", "linear_backward", "dz = tl.where(cols[None, :] == target[:, None], missing[:, None], p * -g[:, None])", "dz = p * -g[:, None] + tl.where(cols[None, :] == target[:, None], g[:, None], 0.0)", "confident_tokens"),
    Mutant("backward: the target's own probability forgotten", "linear_backward", "missing = -g * expm1(tl.load(logp_ptr + at, mask=active, other=0.0))", "missing = g", LINEAR),
    Mutant("backward: another row's lse", "linear_backward", "lse = tl.load(lse_ptr + at, mask=active, other=0.0) * LOG2E", "lse = tl.load(lse_ptr + at // 2, mask=active, other=0.0) * LOG2E", LINEAR),
    Mutant("backward: rows as they stood before they were gathered", "linear_backward", "row = tl.load(order_ptr + start + r, mask=active, other=0)", "row = start + r", LINEAR),
    Mutant("backward: another part's shift", "linear_backward", "shifts = shift_ptr + tl.cast(col0 // WIDTH, tl.int64) * saved_rows", "shifts = shift_ptr + tl.cast(col0 // WIDTH // 2, tl.int64) * saved_rows", LINEAR),
    Mutant("backward: recomputed probabilities without their target", "linear_backward", "p = tl.where(cols[None, :] == target[:, None], missing[:, None], tl.exp2(right * scale - lse[:, None]))", "p = tl.exp2(right * scale - lse[:, None])", LINEAR),
    Mutant("backward: a tile too few a program", "linear_backward", "min((split + 1) * EACH, column_tiles)", "min((split + 1) * EACH - 1, column_tiles)", LINEAR),
    Mutant("backward: the slope of the soft-cap left out", "linear_backward", "tl.where(active[:, None], dz * slope, 0.0)", "tl.where(active[:, None], dz, 0.0)", LINEAR),
    Mutant("product: the sum starts anew at each chunk", "linear_backward", "    return x + there.to(tl.float32)", "    return x", LINEAR),
    Mutant("product: a step of the inner dimension too few", "linear_backward", "for k0 in range(0, k, BK):\n            left", "for k0 in range(0, k - BK, BK):\n            left", LINEAR),
    Mutant("bias: rows that have no gradient", "linear_backward", "live = min(tl.load(count_ptr) - start, rows)", "live = rows", LINEAR),
    # The fused loss.
    Mutant("factored: the target's number left as it was kept", "linear_factored", "d = expm1(tl.load(logp_ptr + row)) / share", "d = expm1(tl.load(logp_ptr + row)) / share + 1.0 / share", PPO),
    Mutant("factored: the shift left out of the factor", "linear_factored", "factor = tl.where(g == 0, 0.0, -g * share / temperature)", "factor = tl.where(g == 0, 0.0, -g / temperature)", PPO),
    Mutant("factored: the temperature left out of the factor", "linear_factored", "factor = tl.where(g == 0, 0.0, -g * share / temperature)", "factor = tl.where(g == 0, 0.0, -g * share)", "linear_ppo"),
    Mutant("factored: hidden states outside the mask are read", "linear_factored", "h = tl.where(inside, h, 0.0)", "h = h * 1.0", PPO),
    Mutant("fused loss: every chunk has the first one's weights", "linear_ppo", "g = torch.where(flat[rows], g[0] * c[rows], 0)", "g = torch.where(flat[rows], g[0] * c[: g.shape[1]], 0)", "linear_ppo"),
    Mutant("fused loss: the upstream gradient left out", "linear_ppo", "(x * by).to(x_ptr", "x.to(x_ptr", "linear_ppo"),
    # Logits that the caller holds.
    Mutant("logits: a block too few", "logits_logprob", "for start in range(0, vocab, BLOCK):\n        inside = start + offs < vocab\n        z = tl.load(row_ptr", "for start in range(0, vocab - BLOCK, BLOCK):\n        inside = start + offs < vocab\n        z = tl.load(row_ptr", "logits_logprob confident_tokens"),
    Mutant("logits: the gradient not divided by the temperature", "logits_logprob", "(d / temperature).to(out_ptr", "d.to(out_ptr", "logits_logprob"),
    Mutant("logits: the entropy's gradient without the entropy", "logits_logprob", "d -= p * ge * (tl.maximum(log_p, FLOOR) * LN2 + entropy)", "d -= p * ge * (tl.maximum(log_p, FLOOR) * LN2)", "logits_logprob"),
    # Token-sized kernels.
    Mutant("GAE: nothing comes over from the block to the right", "gae", "adv = adv + factor * carried", "adv = adv + factor * 0.0", "gae"),
    Mutant("GAE: the last value is followed by another sequence's", "gae", "next_v = tl.where(is_last, after, next_v)", "next_v = next_v + 0.0", "gae"),
    Mutant("GAE: moments of the tokens outside the mask too", "gae", "n = tl.sum(inside.to(tl.float64), axis=0)", "n = tl.sum(in_row.to(tl.float64), axis=0)", "gae"),
    Mutant("rewards: the clip before the scale", "token_rewards", "clip(beta1 * (dpo - dpo_ref), dpo_clip)", "beta1 * clip(dpo - dpo_ref, dpo_clip)", "token_rewards"),
    Mutant("rewards: the score at the first token", "token_rewards", "rightmost = tl.max(tl.where(inside, offs, -1), axis=0)", "rightmost = tl.min(tl.where(inside, offs, 1 << 30), axis=0)", "token_rewards"),
    Mutant("PPO: the clip on the wrong side", "ppo_loss", "low = (adv < 0) & (ratio < 1 - clip_low)", "low = (adv > 0) & (ratio < 1 - clip_low)", "ppo_loss"),
    Mutant("PPO: clipped tokens keep their gradient", "ppo_loss", "tl.where(idle | low | high, 0.0, -scale * ratio * c)", "tl.where(idle, 0.0, -scale * ratio * c)", "ppo_loss"),
    Mutant("PPO: the clipped value's slope", "ppo_loss", "slope = tl.where(cut, 0.0, error)", "slope = tl.where(cut, error_clipped, error)", "ppo_loss"),
    Mutant("PPO: the last sequences' parts not merged", "ppo_loss", "for first in range(0, programs, MERGE_ROWS):", "for first in range(0, programs - MERGE_ROWS, MERGE_ROWS):", "ppo_loss"),
    Mutant("three models: the reference's logits for the DPO model's", "fused_rewards", "row_logprob(dpo_ptr + token * stride_dpo, target", "row_logprob(ref_ptr + token * stride_ref, target", "fused_rewards"),
    # What launchers ask for, on tensors without memory.
    Mutant("launch: rows of logits counted in 32 bits", "logits_logprob", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "meta_launches", False),
    Mutant("launch: padded rows begin at a 32-bit place", "_layout", "start = row.to(tl.int64) * width", "start = row * width", "meta_launches", False),
    Mutant("launch: kept probabilities by 32 bits", "linear_backward", "row = tl.load(order_ptr + start + r, mask=active, other=0)", "row = tl.load(order_ptr + start + r, mask=active, other=0).to(tl.int32)", "meta_launches", False),
    Mutant("launch: column tiles along the second axis", "linear_backward", "on_grid(linear_dlogits_saved_kernel, (triton.cdiv(rows, tile.rows), triton.cdiv(columns, part)))", "on_grid(linear_dlogits_saved_kernel, (triton.cdiv(rows, tile.rows), columns))", "meta_launches", False),
    Mutant("launch: the number of rows is compiled for", "linear_forward", '@triton.jit(do_not_specialize=["rows"])', "@triton.jit", "meta_launches", False),
    Mutant("memory: dz of the whole vocabulary", "linear_backward", "DLOGITS_BYTES = 1 << 28", "DLOGITS_BYTES = 1 << 40", "meta_launches", False),
    Mutant("memory: every chunk's probabilities kept", "linear_ppo", "            del stats\n", "            logp.kept = [*getattr(logp, \"kept\", []), stats]\n", "meta_launches", False),
    # Which measured tiles are used.
    Mutant("tiles: what is left out is used", "tiles", "        if not why:\n            break", "        if why:\n            break", "tile_check"),
    Mutant("tiles: another Triton's entry as it is", "tiles", "if same or not gpu_of(device):", "if same or not gpu_of(device) or entries and (same := [*entries.values()][-1]):", "tile_check"),
]
# fmt: on


def survives(mutant: Mutant) -> str:
    """'' where a test notices, else what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "tests").mkdir()
        shutil.copytree(ROOT / "tests/kernels", copy / "tests/kernels", ignore=shutil.ignore_patterns("__pycache__"))
        for helper in (ROOT / "tests").glob("*.py"):
            shutil.copy(helper, copy / "tests")
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "kernels" / "rto_kernels" / f"{mutant.file}.py"
        source = path.read_text()
        if mutant.line not in source:
            return "its line is not in the source any more"
        path.write_text(source.replace(mutant.line, mutant.fault))
        tests = [f"tests/kernels/test_{name}.py" for name in mutant.tests.split()]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests],
            cwd=copy, capture_output=True, text=True,
            env={**os.environ, "TRITON_INTERPRET": str(int(mutant.interpret)), "RTO_KERNELS_MUTANT": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy / "kernels")},
        )  # fmt: skip
    if run.returncode == 0:
        return f"survives {mutant.tests}"
    # A copy that does not even import is no test of the tests.
    return "" if run.returncode == 1 else f"pytest ended with status {run.returncode}: {run.stdout[-300:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--match", default="", help="only mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.match in m.name]
    bad = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, problem in zip(chosen, pool.map(survives, chosen), strict=True):
            print(f"MISSED  {mutant.name}: {problem}" if problem else f"caught  {mutant.name}", flush=True)
            bad += bool(problem)
    print(f"{len(chosen) - bad} of {len(chosen)} planted faults caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
