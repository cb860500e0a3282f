"""The transducer loss by its definition, and random batches for it.

Authors
 * The sb_memeff authors 2026
"""

import torch
from hypothesis import strategies as st

from sb_memeff.nnet.transducer_loss.batch import REDUCTIONS
from tests.unittests.random_configurations import layouts


def negative_log_likelihoods(logits, batch):
    """[B] in float64, cell by cell, with plain autograd.

    FastEmit multiplies value and gradient of emissions by 1 + lambda.
    """
    faster = 1 + batch["fastemit_lambda"]
    found = []
    for b, (frames, labels) in enumerate(batch["samples"]):
        inside = logits[b, :frames, : len(labels) + 1]
        scores = inside.double().log_softmax(-1)
        blank = scores[..., batch["blank"]]
        # None is an impossible state, whose logarithm has no gradient.
        alpha = {(0, 0): scores.new_zeros(())}
        for t in range(frames):
            for u in range(len(labels) + 1):
                ways = []
                if t and alpha[t - 1, u] is not None:
                    ways.append(alpha[t - 1, u] + blank[t - 1, u])
                if u and alpha[t, u - 1] is not None:
                    emit = scores[t, u - 1, labels[u - 1]]
                    if emit.isfinite():
                        emit = faster * emit - (faster - 1) * emit.detach()
                    ways.append(alpha[t, u - 1] + emit)
                ways = [way for way in ways if way != -torch.inf]
                if ways:
                    alpha[t, u] = torch.stack(ways).logsumexp(0)
                else:
                    alpha.setdefault((t, u), None)
        end = frames - 1, len(labels)
        total = None if alpha[end] is None else alpha[end] + blank[end]
        if total is None or total == -torch.inf:
            total = logits.new_tensor(-torch.inf, dtype=torch.float64)
        found.append(-total)
    return torch.stack(found)


def reduced(nll, frames, reduction):
    """Value and weights of the samples' gradients, as the docstring says."""
    frames = torch.tensor(frames, dtype=torch.float64)
    of_all = torch.ones_like(nll)
    return {
        "mean": ((nll / frames).mean(), of_all),
        "sum": ((nll / frames).sum(), of_all),
        "none": (nll / frames, of_all),
        "nll_mean": (nll.mean(), of_all / len(nll)),
        "nll_sum": (nll.sum(), of_all),
        "nll": (nll, of_all),
    }[reduction]


@st.composite
def batches(draw):
    """Sizes, samples and settings of both losses, as a dict."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    vocabulary = draw(st.integers(2, 6))
    blank = draw(st.integers(0, vocabulary - 1))
    symbols = [s for s in range(vocabulary) if s != blank]
    samples = draw(
        st.lists(
            st.tuples(
                st.integers(1, rows),
                # Repeated labels are likely, with few symbols.
                st.lists(st.sampled_from(symbols), max_size=columns),
            ),
            min_size=1,
            max_size=3,
        )
    )
    return {
        "rows": rows,
        "columns": columns,
        "vocabulary": vocabulary,
        "blank": blank,
        "samples": samples,
        # Behind the targets of a sample: no symbols.
        "padding": draw(st.sampled_from([0, blank, -1, 100])),
        "target_dtype": draw(
            st.sampled_from([torch.int64, torch.int32, torch.int8])
        ),
        "length_dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "layout": draw(layouts),
        "reduction": draw(st.sampled_from(sorted(REDUCTIONS))),
        "fastemit_lambda": draw(st.sampled_from([0.0, 0.0, 0.3])),
        "clamp": draw(st.sampled_from([None, None, 0.2])),
        # Of a [B] loss; otherwise of the loss.
        "weights": draw(
            st.lists(
                st.sampled_from([1.0, 0.5, -2.0, 0.0]),
                min_size=len(samples),
                max_size=len(samples),
            )
        ),
        "seed": draw(st.integers(0, 10**6)),
        "scale": draw(st.sampled_from([1.0, 0.0, 10.0])),
    }


def targets_and_lengths(batch):
    """Targets [B, U], and both relative lengths [B]."""
    samples, columns = batch["samples"], batch["columns"]
    targets = torch.full(
        (len(samples), columns), batch["padding"], dtype=batch["target_dtype"]
    )
    for row, (_, labels) in zip(targets, samples):
        row[: len(labels)] = torch.tensor(labels, dtype=row.dtype)
    frames = [frames for frames, _ in samples]
    counts = [len(labels) for _, labels in samples]
    dtype = batch["length_dtype"]
    return (
        targets,
        torch.tensor(frames, dtype=dtype) / batch["rows"],
        torch.tensor(counts, dtype=dtype) / max(columns, 1),
    )


def upstream(batch):
    """Gradient of the loss, a scalar or [B]."""
    weights = torch.tensor(batch["weights"], dtype=torch.float64)
    return weights if batch["reduction"] in ("none", "nll") else weights[0]
