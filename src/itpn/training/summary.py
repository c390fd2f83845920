"""What a run says of itself at its start and at its end: tables, summary.json, model.safetensors."""

import json
from pathlib import Path
from typing import Any

from itpn.checkpoints.io import hold_the_same
from itpn.system.console import make_table
from itpn.system.writing import write_whole
from itpn.training.launch import describe_machine, device_name
from itpn.training.metrics_log import MetricsLog
from itpn.training.optimization import peak_lr
from itpn.training.run_folder import RunFolder
from itpn.training.state import Training


def print_start(run: Training) -> None:
    """What is about to run, as a table."""
    config, length, images, rows = run.config, run.length, run.loader.images, run.job.rows
    name = config.model.name or "a network of its own sizes"
    parameters = sum(p.numel() for p in run.module.model.parameters()) / 1e6
    accumulate = config.trainer.accumulate_grad_batches
    passes = f" x {accumulate} passes" if accumulate > 1 else ""
    processes = f" x {run.processes} processes" if run.processes > 1 else ""
    total = f" = {length.global_batch}" if processes or passes else ""
    data = f" ({rows['data']})" if "data" in rows else ""
    size = f", {rows['size']}" if "size" in rows else ""
    shown: dict[str, str | Path] = {
        "model": f"{name}, {parameters:.2f} M parameters, patch size {config.model.patch_size}",
        **{title: row for title, row in rows.items() if title not in ("size", "unit")},
        "data": f"{images:,} {rows.get('unit', 'images')}{data}{size}",
        "batch": f"{min(config.data.batch_size, images)}{processes}{passes}{total}",
        "steps": f"{length.total_steps:,} ({length.steps_per_epoch:,} an epoch)",
        "learning rate": f"{peak_lr(config.optimizer, length.global_batch):.3g} at its peak",
        "device": f"{device_name(run.device)}, {run.precision}",
        "folder": run.folder.path,
    }
    run.console.print(make_table(f"{run.module.recipe} / {config.name}", shown))


def summarize(log: MetricsLog, finished: bool) -> dict[str, Any]:
    """What ``summary.json`` says of a run; metrics are fractions from 0 to 1, durations seconds, memory GB."""
    run, config = log.run, log.run.config
    return {
        "recipe": run.module.recipe,
        "name": config.name,
        "task": config.task,
        "finished": finished,
        "stopped_early": run.stopped_early,
        "epochs": run.step / run.length.steps_per_epoch,
        "steps": run.step,
        "images_seen": log.images_seen,
        "images_skipped": log.corrupt.skipped.count,
        "images_per_second": log.speed.images / log.speed.seconds if log.speed.seconds else 0.0,
        "data_wait_fraction": log.speed.wait_fraction,
        "duration_seconds": log.speed.duration,
        "metrics": {name: value for name, value in log.metrics.items() if value is not None},
        **describe_machine(run.device, run.processes, run.precision),
    }


def write_summary(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write ``summary.json`` of a run."""
    with folder.writing(folder.summary):
        write_whole(folder.summary, (json.dumps(summary, indent=2) + "\n").encode())


def finish(log: MetricsLog, visualization: Path | None) -> None:
    """Write weights and summary, and show them.

    Args:
        visualization: the last one.
    """
    written = save_weights(log.run, log.run.folder.weights)
    print_summary(log, write_results(log, written), visualization)


def complete(log: MetricsLog, missing: bool, visualization: Path | None) -> None:
    """Of a run whose steps were all taken before: write weights and summary if one is missing or has other weights.

    Args:
        missing: whether a file is missing.
        visualization: the last one.
    """
    run, folder = log.run, log.run.folder
    new = folder.weights.with_name(f"{folder.weights.name}.tmp")
    written = save_weights(run, new)
    with folder.writing(folder.weights):
        same = hold_the_same(new, folder.weights)
        new.unlink() if same else new.replace(folder.weights)
    missing = missing or not same
    longer = "--evaluation.patience" if run.stopped_early else "--trainer.max-epochs or max-steps"
    line = f"{folder.path} is complete at step {run.step}; raise {longer} to train longer, "
    line += "or choose another --name" + ("; writing the weights and summary it lacked" if missing else "")
    run.console.print(line, markup=False, highlight=False, soft_wrap=True)
    if missing:
        print_summary(log, write_results(log, written), visualization)


def save_weights(run: Training, path: Path) -> dict[str, str]:
    """Write the weights; what the summary says of them."""
    if not run.sharded:
        run.module.cpu()
    with run.folder.writing(run.folder.weights):
        return run.module.save(path, {} if run.evaluation is None else run.evaluation.metrics)


def write_results(log: MetricsLog, written: dict[str, str]) -> dict[str, Any]:
    summary = {**summarize(log, finished=True), **written}
    folder = log.run.folder
    write_summary(folder, summary)
    log.loggers.log_files([folder.settings, folder.metrics, folder.summary, folder.weights])
    return summary


def print_summary(log: MetricsLog, summary: dict[str, Any], visualization: Path | None) -> None:
    """The table at the end of a run."""
    job, folder = log.run.job, log.run.folder
    epochs = f"{summary['epochs']:.4g}"
    rows: dict[str, str | Path] = {
        "steps": f"{summary['steps']:,} ({epochs} epoch{'' if epochs == '1' else 's'})",
        "loss": f"{summary['metrics'].get('loss', float('nan')):.4f}",
        **(job.evaluation.describe() if job.evaluation is not None else {}),
        "images": f"{summary['images_seen']:,} seen, {summary['images_skipped']} files skipped",
        "speed": f"{summary['images_per_second']:.1f} images/s, {summary['data_wait_fraction']:.1%} waiting for data",
        "peak memory": f"{summary['peak_memory_gb']:.2f} GB",
        "time": f"{summary['duration_seconds']:.0f} s",
        "weights": folder.weights,
        **({} if visualization is None else {"visualization": visualization}),
        "summary": folder.summary,
    }
    log.run.console.print(make_table("finished", rows))
