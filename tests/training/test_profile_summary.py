"""What a summary advises and looks like."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from itpn.training.profile_summary import advise, draw_summary

NOTHING = "nothing stands out: the time goes into the network's own work"


def on_cpu(**changes):
    return {
        "recipe": "itpn-pixel_nano",
        "name": "default",
        "batch": 64,
        "steps": 10,
        "images_per_second": 640.0,
        "step_ms": 100.0,
        "recorded_step_ms": 110.0,
        "host_ms": {
            "data wait": 1.0,
            "copy to device": 1.0,
            "forward": 40.0,
            "backward": 50.0,
            "optimizer": 5.0,
            "other": 3.0,
        },
        "gpu_ms": None,
        "gpu_idle_during": None,
        "host_syncs": None,
        "groups": {"products": 0.7, "attention": 0.1, "pointwise, norms, others": 0.2},
        "longest": [{"name": "aten::mm", "ms": 40.0, "fraction": 0.4, "calls": 105.0}],
        "compiled": False,
        "num_workers": 2,
        "cores": 8,
        "threads": 8,
        "gpu_memory_gb": None,
        "peak_memory_gb": 2.0,
        "precision": "32-true",
        "processes": 1,
        "device": "cpu (x86_64)",
        **changes,
    }


def on_gpu(idle=5.0, during=None, **changes):
    parts = ("data wait", "copy to device", "forward", "backward", "optimizer", "other")
    busy = dict.fromkeys(parts, 0.0) | {"forward": 40.0, "backward": 55.0 - idle, "optimizer": 5.0}
    return on_cpu(
        **{
            "gpu_ms": {**busy, "idle": idle},
            "gpu_idle_during": dict.fromkeys(parts, 0.0) | (during or {"forward": 1.0}),
            "host_syncs": {"forward": 2.0},
            "gpu_memory_gb": 80.0,
            "precision": "bf16-mixed",
            "device": "NVIDIA A100-SXM4-80GB",
            **changes,
        }
    )


def waiting(fraction, **changes):
    metrics = on_cpu(**changes)
    metrics["host_ms"] |= {"data wait": 100 * fraction}
    return metrics


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (on_cpu(), [NOTHING]),
        (waiting(0.04), [NOTHING]),
        (waiting(0.3), ["30% of a step is waiting for data: more --data.num-workers than 2"]),
        (waiting(0.3, num_workers=0), ["--data.num-workers 8 reads images beside"]),
        (waiting(0.3, num_workers=8), ["no core is left to read with"]),
        (on_cpu(threads=1), ["OMP_NUM_THREADS=8"]),
        (on_gpu(), [NOTHING]),
        # the host waits, but the GPU still has work
        (on_gpu(host_ms=waiting(0.4)["host_ms"]), [NOTHING]),
        (on_gpu(30.0, {"data wait": 1.0}), ["30% of a step is waiting for data"]),
        (on_gpu(30.0, {"backward": 0.6, "forward": 0.4}), ["idle for 30% of a step", "in backward: --trainer.compile"]),
        (on_gpu(30.0, compiled=True), ["in forward: a larger --data.batch-size (2 of 80 GB are used)"]),
        (on_gpu(groups={"products": 0.3, "attention": 0.1}), ["only 40% of the GPU's time: --trainer.compile"]),
        (
            on_gpu(groups={"products": 0.6, "communication": 0.3}),
            ["30% of the GPU's time goes into the other"],
        ),
        (on_gpu(precision="32-true"), ["--trainer.precision bf16-mixed"]),
    ],
)
def test_advice(metrics, words):
    advice = advise(metrics)
    assert len(advice) == 1
    assert all(part in advice[0] for part in words)


@pytest.mark.parametrize("metrics", [on_cpu(), on_gpu(30.0, {"data wait": 0.5, "forward": 0.5})])
def test_summary_fits_its_width(metrics):
    page = io.StringIO()
    name = "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float>" + "x" * 99
    metrics["longest"] = [{"name": name, "ms": 40.0, "fraction": 0.4, "calls": 105.0}]
    Console(file=page, width=100).print(draw_summary(metrics, advise(metrics), Path("runs/itpn-pixel_nano/default")))
    text = page.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "640.0 images/s, 100.0 ms a step of 64 images" in text
    assert "recorded steps took 10% more time" in " ".join(text.replace("│", " ").split())
    assert "vectorized_layer_norm_kernel<c10::BFloat16" in text
    assert "at::native" not in text
    assert "calls a step\n" in text
    assert "40.0%           105\n" in text
    if metrics["gpu_ms"]:
        assert "the GPU was idle for 30% of a step, by what the host did: 15% in data wait, 15% in forward" in " ".join(
            text.replace("│", " ").split()
        )
        assert "2 a step for the GPU to catch up: 2 in forward" in text
    else:
        assert "n/a: the trace has no GPU" in text


def test_recording_may_look_quicker():
    """On a busy machine."""
    page = io.StringIO()
    metrics = on_cpu(recorded_step_ms=67.0)
    Console(file=page, width=200).print(draw_summary(metrics, [], Path("runs")))
    assert "recorded steps took 33% less time" in page.getvalue()
