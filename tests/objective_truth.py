"""Preference objectives by the formulas of their papers, in fp64 and from whole logits, one sequence at a time."""

from __future__ import annotations

import math

import torch
from transformers import AutoModelForCausalLM


def truth_logits(model, prompt, response):
    """[response tokens, V] fp64 log-probs."""
    out = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return (out - out.exp().sum(-1, keepdim=True).log())[len(prompt) - 1 : -1]


def minus_log_sigmoid(x):
    return torch.log1p(torch.exp(-x))


def truth_guide(config, reference, prompt, response):
    """[response tokens] the guide's log-ratios."""
    models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) if p else reference
              for p in (config.guide_model, config.guide_base)]  # fmt: skip
    with torch.no_grad():
        guide, base = (truth_logits(m, prompt, response) for m in models)
    return (guide - base).gather(1, torch.tensor(response)[:, None])[:, 0]


def truth_weights(objective, config, guide, chosen):
    if objective == "tgdpo":
        return 1 + (1 if chosen else -1) * config.tgdpo_alpha * config.beta * guide
    clipped = torch.maximum(torch.minimum(guide, torch.tensor(config.tis_high)), torch.tensor(config.tis_low))
    return torch.exp(clipped) if chosen else 1 / torch.exp(clipped)


def truth_loss(objective, config, model, reference, rows, kto):
    """Mean loss of the rows by the formulas of the papers. kto: (desirable flags, mismatched rows) of these rows."""
    losses, ratio, lens, kls, logps = [], [], [], [], []
    weighted = []
    for row in rows:
        r, n, k, lp, w = [], [], [], [], []
        for response in row.responses:
            p = truth_logits(model, row.prompt, response)
            with torch.no_grad():
                q = truth_logits(reference, row.prompt, response)
            pick = torch.tensor(response)[:, None]
            lp.append(p.gather(1, pick).sum())
            r.append(lp[-1] - q.gather(1, pick).sum())
            k.append((q.exp() * (q - p)).sum())
            n.append(len(response))
            if config.guide_model:
                weights = truth_weights(objective, config, truth_guide(config, reference, row.prompt, response), not w)
                w.append((weights * (p - q).gather(1, pick)[:, 0]).sum())
        ratio.append(r), lens.append(n), kls.append(k), logps.append(lp), weighted.append(w)
    if objective == "kto":
        flags, mismatched = kto
        with torch.no_grad():
            drift = [
                (truth_logits(model, m.prompt, m.responses[0]) - truth_logits(reference, m.prompt, m.responses[0]))
                .gather(1, torch.tensor(m.responses[0])[:, None])
                .sum()
                for m in mismatched
            ]
            z = max(0.0, float(sum(drift)) / len(drift))
    for i in range(len(rows)):
        r, n, k, lp = ratio[i], lens[i], kls[i], logps[i]
        b = config.beta
        if objective == "dpo":
            wrong = config.label_smoothing
            right_way, other_way = (minus_log_sigmoid(sign * b * (r[0] - r[1])) for sign in (1, -1))
            losses.append((1 - wrong) * right_way + wrong * other_way - config.nll_coef * lp[0] / n[0])
        elif objective == "r_dpo":
            losses.append(minus_log_sigmoid(b * (r[0] - r[1]) + config.r_dpo_alpha * (n[0] - n[1])))
        elif objective == "simpo":
            losses.append(minus_log_sigmoid(config.simpo_beta * (lp[0] / n[0] - lp[1] / n[1]) - config.simpo_gamma))
        elif objective == "mpo":
            kept = (lp[0] + lp[1]) / (n[0] + n[1])
            losses.append(-1 / (1 + torch.exp(-b * (lp[0] - lp[1]))) - config.mpo_keep * kept)
        elif objective == "ipo":
            losses.append((r[0] / n[0] - r[1] / n[1] - 1 / (2 * b)) ** 2)
        elif objective == "tdpo1":
            losses.append(minus_log_sigmoid(b * ((r[0] - r[1]) - (k[1] - k[0]))))
        elif objective == "tdpo2":
            losses.append(minus_log_sigmoid(b * (r[0] - r[1]) - config.tdpo_alpha * b * (k[1] - k[0].detach())))
        elif config.guide_model:
            losses.append(minus_log_sigmoid(b * (weighted[i][0] - weighted[i][1])))
        elif objective == "mppo":
            p = [torch.exp(x / m) for x, m in zip(lp, n, strict=True)]
            losses.append(minus_log_sigmoid((len(p) - 1) * p[0] - sum(p[1:])))
        elif flags[i]:
            losses.append(config.kto_desirable_weight * (1 - 1 / (1 + torch.exp(-b * (r[0] - z)))))
        else:
            losses.append(config.kto_undesirable_weight * (1 - 1 / (1 + torch.exp(-b * (z - r[0])))))
    return sum(losses) / len(losses)


def relative(ours, truth) -> float:
    """Distance of two lists of gradients, relative to the second."""
    gap = sum(float((a.double() - b).square().sum()) for a, b in zip(ours, truth, strict=True))
    return math.sqrt(gap / sum(float(b.square().sum()) for b in truth))
