"""From a spec to a task."""

from __future__ import annotations

from trainkit.task import Task
from transformerlm.models.specs import ModelSpec
from transformerlm.objectives.autoregressive import Autoregressive
from transformerlm.objectives.specs import AutoregressiveSpec, ObjectiveSpec


def build_objective(spec: ObjectiveSpec, model: ModelSpec) -> Task:
    """The task that trains a model of this spec."""
    match spec:
        case AutoregressiveSpec():
            return Autoregressive(spec, document_mask=model.document_mask)
