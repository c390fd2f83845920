"""What is read from a trace, on hand-made ones in the format of torch.profiler."""

import pytest

from itpn.training.profile_trace import (
    Operation,
    divide_gaps,
    find_gaps,
    group_of,
    length,
    read_device,
    summarize_device,
    summarize_operations,
)


def span(cat, name, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 7, "ts": ts, "dur": dur, "args": args}


def make_events():
    """Two steps of 100 µs: data 0 to 10, copy to 15, forward to 40, backward to 70, optimizer to 80,
    rest; the GPU lags behind the host."""
    events = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},  # neither time nor category
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 5, "pid": 1, "tid": 7, "ts": 20},
    ]
    for begin in (1000.0, 1100.0):
        for name, start, dur in (
            ("ProfilerStep#7", 0, 100),
            ("itpn: data wait", 0, 10),
            ("itpn: copy to device", 10, 5),
            ("itpn: optimizer", 70, 10),
            ("itpn: forward", 15, 25),
            ("itpn: backward", 40, 30),
        ):
            events.append(span("user_annotation", name, begin + start, dur))
        events.append(span("gpu_user_annotation", "ProfilerStep#7", begin + 10, 500))  # no step of the host
        work = (
            ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", "cudaMemcpyAsync", 11, 12, 3),
            ("kernel", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "cudaLaunchKernel", 16, 20, 15),
            ("kernel", "void at::native::vectorized_elementwise_kernel<4, X>", "cudaLaunchKernel", 41, 42, 8),
            ("kernel", "pytorch_flash::flash_bwd_kernel<T>", "cuLaunchKernelEx", 45, 50, 20),
            ("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "cudaLaunchKernelExC", 60, 60, 20),  # overlaps
            ("kernel", "void at::native::multi_tensor_apply_kernel<A>", "cudaLaunchKernel", 75, 80, 10),
        )
        for number, (cat, name, call, asked, start, dur) in enumerate(work):
            mark = int(begin) * 10 + number
            where = "cuda_driver" if call.startswith("cuL") else "cuda_runtime"
            events.append(span(where, call, begin + asked, 1, correlation=mark))
            events.append(span(cat, name, begin + start, dur, correlation=mark, device=0, stream=7))
        events.append(span("cuda_runtime", "cudaStreamSynchronize", begin + 30, 2))
    events.append(span("user_annotation", "itpn: profiler", 1195.0, 4))
    events.append(span("cuda_runtime", "cudaDeviceSynchronize", 1196.0, 2))  # our own
    return events


def test_gaps_of_known_intervals():
    assert find_gaps([], 0, 10) == [(0, 10)]
    assert find_gaps([(0, 10)], 0, 10) == []
    # overlapping, nested, out of order, beyond both ends
    work = [(8, 9), (-5, 1), (2, 5), (3, 4), (4, 6), (9.5, 20)]
    assert find_gaps(work, 0, 10) == [(1, 2), (6, 8), (9, 9.5)]
    assert find_gaps([(12, 13)], 0, 10) == [(0, 10)]
    assert length(find_gaps(work, 0, 10)) == 3.5


def test_gaps_are_divided():
    parts = [(0, 5, "data wait"), (5, 8, "forward"), (8, 10, "profiler")]
    times = divide_gaps([(1, 2), (4, 6), (7, 9)], parts)
    assert times["data wait"] == 2
    assert times["forward"] == 2
    assert times["other"] == 1
    assert sum(times.values()) == 5


def test_device_time():
    device = read_device(make_events())
    # each step: backward's kernels fill 42 to 80, where two of them overlap
    assert device.busy == {
        "data wait": 0,
        "copy to device": 6,
        "forward": 30,
        "backward": 76,
        "optimizer": 20,
        "other": 0,
    }
    # idle in each step: 0 to 12, 15 to 20, 35 to 42, 90 to 100
    assert device.idle == {
        "data wait": 20,
        "copy to device": 4,
        "forward": 20,
        "backward": 4,
        "optimizer": 0,
        "other": 20,
    }
    assert sum(device.busy.values()) + sum(device.idle.values()) == 200
    assert device.syncs == {"forward": 2}
    assert {op.part for op in device.operations if "flash" in op.name} == {"backward"}

    metrics = summarize_device(device, step_ms=0.08, steps=2)
    assert sum(metrics["gpu_ms"].values()) == pytest.approx(0.08)
    assert metrics["gpu_ms"]["forward"] == pytest.approx(0.015)
    assert metrics["gpu_ms"]["idle"] == pytest.approx(0.014)  # of the timed step: recording had added 0.02 of idleness
    assert sum(metrics["gpu_idle_during"].values()) == pytest.approx(1)
    assert metrics["host_syncs"] == {"forward": 1}
    # a GPU that was busier than a timed step is long
    assert sum(summarize_device(device, step_ms=0.05, steps=2)["gpu_ms"].values()) == pytest.approx(0.05)


def test_groups_and_longest():
    metrics = summarize_operations(read_device(make_events()).operations, steps=2)
    assert sum(metrics["groups"].values()) == pytest.approx(1)
    assert metrics["groups"] == {
        "attention": pytest.approx(20 / 76),
        "communication": pytest.approx(20 / 76),
        "products": pytest.approx(15 / 76),
        "optimizer": pytest.approx(10 / 76),
        "pointwise, norms, others": pytest.approx(8 / 76),
        "copies": pytest.approx(3 / 76),
    }
    assert metrics["longest"][2] == {
        "name": "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n",
        "ms": pytest.approx(0.015),
        "fraction": pytest.approx(15 / 76),
        "calls": 1,
    }


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("aten::convolution_backward", "products"),
        ("aten::mkldnn_convolution", "products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("triton_tem_fused_addmm_3", "products"),
        ("triton_poi_fused_addmm_gelu_4", "pointwise, norms, others"),
        ("aten::upsample_bilinear2d", "pointwise, norms, others"),
        ("aten::mul", "pointwise, norms, others"),
        ("aten::native_layer_norm", "pointwise, norms, others"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("aten::cat", "copies"),
        ("Memset (Device)", "copies"),
        ("gloo:all_reduce", "communication"),
    ],
)
def test_names_are_grouped(name, group):
    assert group_of(Operation(name, "forward", 1.0)) == group


def test_the_part_tells_the_group():
    assert group_of(Operation("aten::mul", "optimizer", 1.0)) == "optimizer"
    assert group_of(Operation("aten::copy_", "data wait", 1.0)) == "data wait"
