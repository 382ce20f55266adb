"""Learning-rate schedules as pure functions of the step: nothing to save, any step can be asked for."""

from __future__ import annotations

import math

from trainkit.specs import ConstantScheduleSpec, CosineScheduleSpec, ScheduleSpec, WSDScheduleSpec


def learning_rate_factor(spec: ScheduleSpec, step: int, max_steps: int) -> float:
    """What multiplies the peak learning rate at `step` (0-based: the first update has step 0) of `max_steps`.

    Warm-up reaches 1 at its last step, so that the first update is already a small real one. The decay ends exactly at
    `final_fraction` on the last step.
    """
    assert 0 <= step < max_steps
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    match spec:
        case ConstantScheduleSpec():
            return 1.0
        case CosineScheduleSpec():
            progress = _progress(step, spec.warmup_steps, max_steps)
            return spec.final_fraction + (1 - spec.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        case WSDScheduleSpec():
            decay_start = max(spec.warmup_steps, max_steps - round(spec.decay_fraction * max_steps))
            if step < decay_start:
                return 1.0
            return 1 + (spec.final_fraction - 1) * _progress(step + 1, decay_start, max_steps + 1)


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` is from `start` (0) to the last step before `end` (1)."""
    return min(1.0, max(0.0, (step - start) / max(1, end - 1 - start)))
