"""Log-probs and their gradient from logits the caller has, beside the plain formulas and peers'.

Fewest bytes: every logit read once forward; read and its gradient written backward.
"""

import rto_kernels as rk
import torch

from bench.harness import FULL, ON_GPU, compare, gradients, source
from bench.kernels.peers import compiled, eager_logp, log_softmax_logp, openrlhf_logp, trl_selective

TOKENS, VOCAB = ((8192, 128256) if ON_GPU else (1024, 64000)) if FULL else (256, 8192)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 2e-2 if ON_GPU else 1e-4


def test_logprobs_from_logits(once):
    random = source()
    logits = (torch.randn(1, TOKENS, VOCAB, **random) * 3).to(DTYPE).requires_grad_()
    targets = torch.randint(VOCAB, (1, TOKENS), **random)
    up = torch.randn(1, TOKENS, **random)

    def run(function, x=logits):
        logp = function(x, targets)
        return gradients({"logp": logp}, {"logp": up.to(logp.dtype)}, {"logits": x})

    contenders = {
        "ours": lambda: run(rk.logprobs_from_logits),
        "log_softmax": lambda: run(log_softmax_logp),
        "eager": lambda: run(eager_logp),
        "OpenRLHF's formula": lambda: run(openrlhf_logp),
    }
    others = {"TRL selective_log_softmax": trl_selective(), "torch.compile": compiled(eager_logp)}
    for name, function in others.items():
        if function is not None:
            contenders[name] = lambda function=function: run(function)
    size = logits.element_size()
    record = compare(
        "logprobs_from_logits", f"N {TOKENS}, V {VOCAB}", contenders,
        tolerance=TOLERANCE, reference=lambda: run(log_softmax_logp),
        moved=3 * TOKENS * VOCAB * size, held=TOKENS * VOCAB * size,
        shape={"N": TOKENS, "V": VOCAB, "dtype": str(DTYPE)},
    )  # fmt: skip
    once(contenders["ours"], record)
