"""Rows of docs/security.md: checkpoints, of others and our own, safetensors, the hub."""

import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from security.attack import limited, refused

from itpn.checkpoints import hub
from itpn.checkpoints.files import read_checkpoint
from itpn.checkpoints.torchscript import read_script
from itpn.cli import main
from itpn.teachers.files import read_tensors


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "code in the file was run"


def save_hostile(path, canary, form):
    content = {"model": {"blocks.0.norm1.weight": torch.ones(3)}, "hook": Canary(canary)}
    if form == "zip":
        torch.save(content, path)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "numpy":  # an array of objects, which NumPy reads by pickle
        path.write_bytes(b"\x93NUMPY\x01\x00v\x00" + str({"descr": "|O", "fortran_order": False, "shape": ()}).encode())
        with path.open("ab") as file:
            file.write(pickle.dumps(content))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "numpy"])
@pytest.mark.parametrize("name", ["x.pth", "x.ckpt", "x.safetensors"])
def test_a_pickle_runs_nothing(tmp_path, canary, monkeypatch, form, name):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # an environment must not weaken it
    save_hostile(tmp_path / name, canary, form)
    line = refused("inspect", tmp_path / name)
    assert name in line
    assert ("which could run code" in line) == (form in ("zip", "legacy") and name != "x.safetensors")


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "FILE", "."],
        ["convert", "FILE", "out.safetensors"],
        ["export", "FILE", "--out", "out.onnx"],
        ["train", "itpn-pixel_nano", "--data.root", "photos", "--model.checkpoint", "FILE"],
        [
            *["train", "itpn-clip-b_hivit-base-3324-p16_8xb256-amp-coslr-800e_in1k", "--data.root", "photos"],
            *["--teacher.checkpoint", "FILE", "--data.batch-size", "2", "--trainer.devices", "1"],
        ],
        ["train", "classifier_small", "--data.root", "classes", "--model.checkpoint", "FILE"],
        ["evaluate", "classifier_small", "--data.root", "classes", "--checkpoint", "FILE"],
    ],
)
def test_no_command_runs_a_pickle(tmp_path, canary, monkeypatch, photo, command):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(photo.parent, tmp_path / "classes" / name)
    save_hostile(tmp_path / "x.pth", canary, "zip")
    assert "which could run code" in refused(*["x.pth" if word == "FILE" else word for word in command])


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_run_resumes_without_running_code(tmp_path, canary, monkeypatch, photo, form):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    checkpoints = tmp_path / "runs" / "itpn-pixel_nano" / "x" / "checkpoints"
    checkpoints.mkdir(parents=True)
    save_hostile(checkpoints / "last.ckpt", canary, form)
    options = ["--data.root", "photos", "--name", "x", "--data.batch-size", "2", "--output-dir", "runs"]
    code, printed = limited(main, ["train", "itpn-pixel_nano", *options])
    assert code in (1, 2)  # it is for docs/runs.md to say which
    assert printed.splitlines()[-1].startswith("itpn: ")
    assert "last" in printed


def test_a_run_resumes_without_unpacking(tmp_path, photo):
    """Half a GiB in two megabytes, in the place of a tensor."""
    last = tmp_path / "runs" / "itpn-pixel_nano" / "x" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    torch.save({"state_dict": {"model.x": torch.zeros(2**10)}}, tmp_path / "small")
    with (
        zipfile.ZipFile(tmp_path / "small") as small,
        zipfile.ZipFile(last, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        for name in small.namelist():
            with archive.open(name, "w") as file:
                for _ in range(32 if name.endswith("/data/0") else 0):
                    file.write(bytes(2**24))
                file.write(small.read(name))
    options = ["--data.root", photo.parent, "--name", "x", "--data.batch-size", "2", "--output-dir", tmp_path / "runs"]
    line = refused("train", "itpn-pixel_nano", *options, memory=2**28)
    assert "last.ckpt is corrupt (its parts are compressed" in line
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


class Writes(torch.nn.Module):
    """A program that writes a file when it is loaded."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight = state[0]
        self.training = state[1]
        torch.save(self.weight, "canary")

    def forward(self, x):
        return x * self.weight


def save_script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and yet how CLIP was published
        torch.jit.script(module).save(path)


def test_a_torchscript_archive_runs_nothing(tmp_path, canary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_script(Writes(), tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(tmp_path / "x.pt")
    assert canary.exists(), "the attack is real"
    canary.unlink()
    assert "TorchScript archive, which is code, and is not read" in refused("inspect", "x.pt")
    answer, _ = limited(read_tensors, "x.pt")
    assert "has no weights in it" in answer


def test_a_torchscript_archive_gives_the_tensors_that_torch_gives(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.BatchNorm1d(4).half()))
    module.register_buffer("steps", torch.arange(4)[1:])
    save_script(module, tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = torch.jit.load(tmp_path / "x.pt").state_dict()
    found = read_script(str(tmp_path / "x.pt"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0)


def test_a_torchscript_archive_names_no_other_function(tmp_path, canary):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Canary(canary), protocol=2))
        archive.writestr("x/constants.pkl", b"")
    answer, _ = limited(read_tensors, str(path))
    assert "system), which could run code" in answer


@pytest.mark.parametrize("kind", ["expanded", "meta", "sparse", "many", "deflated", "legacy"])
def test_tensors_that_the_file_does_not_hold(tmp_path, kind):
    path = tmp_path / "x.pth"
    huge = {
        "expanded": torch.ones(1).expand(2**40),
        "meta": torch.empty(2**40, device="meta"),
        "sparse": torch.sparse_coo_tensor([[0]], [1.0], (2**40,)),
        "legacy": torch.ones(1).expand(2**40),
    }
    if kind == "many":  # each of a size that a file may have
        one = torch.ones(1).expand(2**24)
        torch.save({"model": {f"blocks.{i}.norm1.weight": one[:] for i in range(4096)}}, path)
    elif kind == "deflated":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            with archive.open("x/data.pkl", "w") as file:
                for _ in range(96):
                    file.write(bytes(2**24))
            archive.writestr("x/version", "3")
    else:
        state = {"model": {"blocks.0.norm1.weight": huge[kind]}}
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    assert path.stat().st_size < 2**24
    line = refused("inspect", path)
    assert ("is not dense" if kind in ("meta", "sparse") else "made to exhaust memory") in line


def test_shared_weights_stay_allowed(tmp_path):
    shared = torch.randn(2**22)
    torch.save({"model": {"a": shared, "b": shared, "c": shared.view(2, -1)}}, tmp_path / "x.pth")
    assert len(read_tensors(str(tmp_path / "x.pth"))) == 3


def write_header(path, header, size=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header)


@pytest.mark.parametrize("kind", ["header", "shape", "offsets", "nested", "metadata"])
def test_safetensors(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    one = {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]}
    if kind == "header":
        write_header(path, b"{}", 2**62)
    elif kind == "shape":
        write_header(path, {"x": {**one, "shape": [2**32, 2**32]}})
    elif kind == "offsets":
        write_header(path, {"x": one})
    elif kind == "nested":
        write_header(path, b'{"x":' * 10**5 + b"1" + b"}" * 10**5)
    else:
        deep = "[" * 10**5 + "]" * 10**5
        save_file({"norm.weight": torch.ones(2)}, path, {"format": "itpn", "config": deep})
    assert "corrupt" in refused("inspect", path)


def test_a_nested_config_beside_weights_is_passed_over(tmp_path):
    save_file({"stages.0.0.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[" * 10**5 + "]" * 10**5)
    assert "is of another network" in refused("inspect", tmp_path)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_pipe_or_device_does_not_block(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "does not exist" in refused("inspect", tmp_path / name)
    assert "does not exist" in refused("inspect", "/dev/zero")


def test_from_the_hub_only_safetensors_are_read(tmp_path, canary, monkeypatch):
    asked = []

    def download(repository, filename):
        asked.append(filename)
        save_hostile(tmp_path / filename, canary, "zip")
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub, "check_hub", lambda *_: None)
    with pytest.raises(Exception, match=r"hf-hub:someone/model is corrupt or no checkpoint"):
        read_checkpoint("hf-hub:someone/model")
    assert asked == ["config.json", "model.safetensors"]
