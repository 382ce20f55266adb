"""`transformerlm-replay`: a past step of a run once more, with its texts and its gradients."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.common import Command, run_command
from config.loading import Loaded
from config.schemas import ReplayConfig, TrainConfig
from config.specs import ReplaySpec
from trainkit.artifacts import explain_failed_writes, publish_file
from trainkit.errors import EXIT_FAILURE, EXIT_USAGE, UserError
from trainkit.run_directory import read_config, read_environment

if TYPE_CHECKING:
    from trainkit.replay import Check, Replayed
    from transformerlm.tokenizer.tokenizer import Tokenizer

Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(COMMAND, argv)


def run(loaded: Loaded[ReplayConfig], arguments: argparse.Namespace) -> int:
    report = replay(loaded.config.replay)
    as_json = json.dumps(report, indent=2, ensure_ascii=False)
    if arguments.out:
        with explain_failed_writes(arguments.out):
            publish_file(arguments.out, as_json + "\n")
    print(as_json if arguments.json else table(report))
    return EXIT_FAILURE if report["matches"] is False else 0


def replay(spec: ReplaySpec) -> Report:
    """Train the step again, on as many processes as the run has, and describe it as plain values."""
    from trainkit.launch import launch, processes_to_start

    config = recorded_config(Path(spec.run))
    config = _with_processes(config, spec)
    if spec.step > config.training.max_steps:
        raise UserError(
            f"replay.step = {spec.step}, but {spec.run} has {config.training.max_steps} steps; choose one of them",
            EXIT_USAGE,
        )
    processes = processes_to_start(config.distributed, config.training.device)
    if processes > 1:
        return launch(processes, _replay_here, config, spec)
    return _replay_here(config, spec)


def recorded_config(directory: Path) -> TrainConfig:
    """The settings that a run recorded; in one sentence what is wrong with them."""
    from pydantic import ValidationError

    path = directory / "config.json"
    try:
        content = json.loads(path.read_bytes())
        content.pop("inputs", None)
        return TrainConfig.model_validate_json(json.dumps(content))
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no run (it has no config.json); name a run folder such as runs/quickstart"
        ) from None
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        what = "its content"
        if isinstance(error, ValidationError):
            what = ", ".join(sorted({".".join(map(str, one["loc"])) for one in error.errors()}))
        raise UserError(
            f"{path} cannot be read as the settings of this version ({what}): replay with the version that trained it"
        ) from None


def _with_processes(config: TrainConfig, spec: ReplaySpec) -> TrainConfig:
    distributed = replace(config.distributed, processes=spec.processes) if spec.processes else config.distributed
    training = replace(config.training, device=spec.device or config.training.device)
    if not training.threads:
        # The number of threads decides about bits on the CPU, so the run's own counts.
        training = replace(training, threads=read_environment(spec.run).get("threads", 0))
    return config.model_copy(update={"distributed": distributed, "training": training})


def _replay_here(config: TrainConfig, spec: ReplaySpec) -> Report:
    """On each rank; the report is complete on the first."""
    from cli.training import compose, open_ingredients
    from trainkit.beginnings import Beginning, first_beginning, load_beginning
    from trainkit.checkpoints import CheckpointStore, load_model_tensors, load_weights
    from trainkit.distribution import main_first, open_world
    from trainkit.interrupts import catch_interrupts
    from trainkit.logging.run_log import NullLog
    from trainkit.replay import checkpoint_before, replay_step

    directory = Path(spec.run)
    began_with = read_config(directory)
    with open_world(config.training) as world, catch_interrupts() as interrupts:
        notes: list[str] = []
        store = CheckpointStore(directory / "checkpoints", config.checkpoint, report=notes.append)

        def find() -> Beginning:
            path = checkpoint_before(store.root, spec.step, notes.append)
            return Beginning("own", path) if path is not None else first_beginning(store)

        beginning = main_first(find, world)
        ingredients = open_ingredients(config, began_with.get("inputs", {}).get("revision", ""))
        _check_inputs(directory, began_with.get("inputs", {}), ingredients)
        snapshot = load_beginning(beginning, store, max_steps=config.training.max_steps, new_horizon=True)
        if snapshot is not None and snapshot.trainer["step"] >= spec.step:
            raise UserError(
                f"{beginning.path}, where the run began, is of step {snapshot.trainer['step']}: choose a later step"
            )
        composed = compose(ingredients, directory, store, world, NullLog(), interrupts)
        if beginning.kind == "weights":
            load_model_tensors(composed.model, load_weights(beginning.path), str(beginning.path))
        replayed = replay_step(composed, spec.step, snapshot)
        if not world.is_main:
            return {}
        if spec.save:
            _save(Path(spec.save), replayed)
        return describe(replayed, ingredients.tokenizer, spec, directory, str(beginning), notes)


def _check_inputs(directory: Path, recorded: Mapping[str, Any], ingredients: Any) -> None:
    now = json.loads(
        json.dumps({"tokenizer": ingredients.tokenizer.content_hash, "train": ingredients.data.inputs["train"]})
    )
    changed = [name for name, value in now.items() if recorded.get(name) not in (None, value)]
    if changed:
        raise UserError(
            f"the {' and the '.join(changed)} data that {directory}/config.json names are no longer those that the run "
            "was trained with; put them back, for another batch is no replay"
        )


def describe(
    replayed: Replayed, tokenizer: Tokenizer, spec: ReplaySpec, directory: Path, beginning: str, notes: Sequence[str]
) -> Report:
    """The step as plain values."""
    from trainkit.logging.jsonl import METRICS_FILE
    from trainkit.logging.records import read_records
    from trainkit.replay import norms, tensor_hash, verify_records

    rows = [
        {"sample": int(sample), "text": tokenizer.decode(tokens.numpy())}
        for batch in replayed.batches
        for sample, tokens, valid in zip(batch["sample"], batch["tokens"], batch["valid"], strict=True)
        if valid
    ]
    try:
        checks = verify_records(read_records(directory / METRICS_FILE), replayed)
    except (OSError, UserError) as error:
        notes, checks = [*notes, f"the records of the run cannot be read ({error})"], []
    lengths = norms(replayed.gradients)
    return {
        "run": str(directory),
        "step": replayed.step,
        "beginning": beginning,
        "notes": list(notes),
        "samples": [row["sample"] for row in rows],
        "rows": rows[: spec.rows] if spec.rows else rows,
        "position": replayed.position,
        "metrics": {name: {"value": value, "hex": value.hex()} for name, value in replayed.metrics.items()},
        "gradients": {
            name: {"norm": lengths[name], "sha256": tensor_hash(tensor), "shape": list(tensor.shape)}
            for name, tensor in replayed.gradients.items()
        },
        "matches": all(check.is_same for check in checks) if checks else None,
        "verified": [_as_json(check) for check in checks],
        "saved": spec.save,
    }


def _as_json(check: Check) -> dict[str, Any]:
    return {
        "step": check.step,
        "name": check.name,
        "recorded": check.recorded.hex(),
        "replayed": check.replayed.hex(),
        "same": check.is_same,
    }


def _save(path: Path, replayed: Replayed) -> None:
    import safetensors.torch

    content = safetensors.torch.save(replayed.gradients, metadata={"step": str(replayed.step)})
    with explain_failed_writes(path):
        publish_file(path, content)


def table(report: Report) -> str:
    """The report for people."""
    lines = [*report["notes"], f"step {report['step']} of {report['run']}, {report['beginning']}"]
    samples = report["samples"]
    lines.append(f"samples   {', '.join(map(str, samples[:8]))}{' …' if len(samples) > 8 else ''} ({len(samples)})")
    lines.append(f"position  {json.dumps(report['position'])}")
    lines += [f"{name:<15} {value['value']:<22.17g} {value['hex']}" for name, value in report["metrics"].items()]
    lines += ["", f"texts of the batch ({len(report['rows'])} of {len(samples)} rows):"]
    lines += [f"  {row['sample']}: {json.dumps(row['text'], ensure_ascii=False)}" for row in report["rows"]]
    lines += ["", "gradients, before clipping: norm, SHA-256"]
    width = max(map(len, report["gradients"]), default=0)
    lines += [f"  {name:<{width}}  {g['norm']:<12.6g} {g['sha256']}" for name, g in report["gradients"].items()]
    if report["saved"]:
        lines.append(f"written to {report['saved']}")
    return "\n".join([*lines, "", verdict(report)])


def verdict(report: Report) -> str:
    """Whether the replay is what the run recorded."""
    checks = report["verified"]
    if not checks:
        return (
            "nothing was recorded between the checkpoint and this step, so that nothing could be compared; choose a "
            "step that was recorded, or train with a smaller training.log_every"
        )
    wrong = [check for check in checks if not check["same"]]
    if not wrong:
        return f"matches the run to the bit: {len(checks)} recorded numbers, up to step {checks[-1]['step']}"
    first = wrong[0]
    return (
        f"does NOT match the run: {first['name']} of step {first['step']} was recorded as {first['recorded']} and is "
        f'{first["replayed"]} here; other hardware, PyTorch, threads or (without distributed.reduction = "tree") '
        "processes, or on CUDA without training.deterministic"
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument("--out", metavar="FILE", help="write the same JSON to a file")


COMMAND = Command(
    name="transformerlm-replay",
    summary="Train a past step of a run once more: which texts it saw, its loss, and the gradient of each parameter, "
    "to the bit. The steps since the nearest earlier checkpoint are trained again in memory; the run's folder is only "
    "read. Exit code 1 where the numbers are not those that the run recorded.",
    schema=ReplayConfig,
    default_config="replay",
    run=run,
    examples=(
        "--run runs/quickstart --step 120",
        "--run runs/quickstart --step 120 --json --rows 0",
        "--run runs/quickstart --step 120 --save gradients.safetensors",
    ),
    useful=("replay.run", "replay.step", "replay.rows", "replay.save", "replay.processes", "replay.device"),
    flags={
        "--run": "replay.run",
        "--step": "replay.step",
        "--rows": "replay.rows",
        "--save": "replay.save",
        "--device": "replay.device",
    },
    add_arguments=_add_arguments,
)


if __name__ == "__main__":
    raise SystemExit(main())
