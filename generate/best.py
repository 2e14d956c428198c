"""Which step of a run is the best, when to stop, and when a better loss means worse samples.

`best` and `samples` below are dictionaries that checkpoints keep as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from config import BEST_BY

# Losses are teacher-forced. Of these figures of samples a warning says when they get worse while the loss improves; the
# samples are few, so smaller differences say nothing.
WATCHED = ("word_error_rate", "speaker_similarity", "stop_rate", "runaway_rate", "code_match")
NOTICEABLE = 0.1


def goodness(name: str, value: float) -> float:
    """More of it is better; a duration ratio is best at 1."""
    return -abs(value - 1) if name == "duration_ratio" else value * BEST_BY[name]


def note(best: Mapping, metric: str, values: Mapping, step: int) -> dict:
    """`best` after an evaluation or a round of samples: {"metric", "value", "step"} of the best one so far.

    "waited" counts those since then. Values of the base (step 0) do not count, nor those that lack `metric`.
    """
    value = values.get(metric)
    if value is None or not step:
        return dict(best)
    bad_samples = values.get("bad_samples", 0)
    # Evaluations on other samples, because of broken clips, cannot be compared: the newer one counts.
    is_new = best.get("metric") != metric or best.get("bad_samples", 0) != bad_samples
    if math.isfinite(value) and (is_new or goodness(metric, value) > goodness(metric, best["value"])):
        return {"metric": metric, "value": value, "step": step} | ({"bad_samples": bad_samples} if bad_samples else {})
    return {**best, "waited": best.get("waited", 0) + 1}


def contradictions(samples: Mapping, loss: float | None, values: Mapping, step: int) -> tuple[dict, list[str]]:
    """(`samples` after a round of samples, how they contradict the validation loss).

    samples: of each watched figure its best value so far, with the step and the validation loss then
    loss:    the validation loss now, None if there was no evaluation yet
    """
    samples, found = dict(samples), []
    for name in WATCHED if loss is not None else ():
        if (value := values.get(name)) is None:
            continue
        best, then, loss_then = samples.get(name, (value, step, loss))
        if loss < loss_then and goodness(name, value) < goodness(name, best) - NOTICEABLE:
            losses = f"the validation loss has improved since step {then} ({loss_then:.4f} to {loss:.4f})"
            found.append(f"{losses} but samples are worse: {name} {best:.3f} to {value:.3f}; trust the samples (--best_by {name})")
        better = name not in samples or goodness(name, value) > goodness(name, best)
        samples[name] = [value, step, loss] if better else [best, then, loss_then]
    return samples, found
