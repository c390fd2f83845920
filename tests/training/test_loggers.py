"""Weights & Biases and MLflow beside TensorBoard: what they are told, offline, and what their accidents cost."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from itpn.cli import main
from itpn.errors import MachineError, UserError
from itpn.tasks.run import train
from itpn.training.config import write_yaml
from itpn.training.loggers import mlflow as mlflow_logger
from itpn.training.loggers.logger import keep_run_id
from itpn.training.loggers.mlflow import MLflowRun
from itpn.training.run_folder import RunFolder


@pytest.fixture
def variables(tmp_path):
    """Environment variables without any of wandb's or MLflow's, and a home without accounts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_"))}
    home = {"HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home/.netrc")}
    Path(home["HOME"]).mkdir()
    with mock.patch.dict(os.environ, {**kept, **home}, clear=True):
        yield os.environ
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def read_wandb(folder: Path) -> list:
    """The records of an offline run: protobuf messages in the log format of LevelDB, after 7 bytes of wandb's."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data, place, message, found = path.read_bytes(), 7, b"", []
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:  # no header fits into this block
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(message)
            message = b""
    return found


def read_history(records: list) -> dict[int, dict]:
    """Values by name of a step."""
    rows = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows[row["_step"]] = row
    return rows


def read_metrics(folder: Path) -> dict[int, dict]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def find_mlflow_run(output: Path):
    """MLflow's client and the only run."""
    import mlflow

    client = mlflow.MlflowClient(mlflow_logger.make_uri(output / "mlflow.db"))
    assert (output / "mlflow.db").is_file()
    experiment = client.get_experiment_by_name("itpn")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def test_a_resumed_run(settings, variables, train_until, capsys):
    """Each has settings, metrics, visualizations and final files of one run, whose steps are logged once."""
    config = settings(logger=("wandb", "mlflow", "tensorboard", "wandb"))
    config.trainer.visualize_every_n_steps, config.trainer.checkpoint_every_n_steps = 6, 5
    train_until(config, 8)
    folder = Path(config.output_dir) / "test/default"
    # as if it had been killed at step 8: the steps from 5 on are taken again
    (folder / "checkpoints/last.ckpt").unlink()
    train(config, "test")
    rows = read_metrics(folder)
    assert list(rows) == list(range(1, 19))

    first, second = sorted(folder.glob("wandb/offline-run-*"))
    assert capsys.readouterr().out.count("wandb: offline, as nobody is logged in") == 2
    assert (folder / "wandb/latest-run").resolve() == second
    records = [read_wandb(first), read_wandb(second)]
    histories = [read_history(own) for own in records]
    assert list(histories[0]) == list(range(9))
    assert list(histories[1]) == list(range(5, 19))
    for step, name in ((step, name) for step in rows for name in ("loss", "lr")):
        told = [own[step][name] for own in histories if name in own.get(step, {})]
        assert told == [float(rows[step][name])] * (2 if 5 < step < 9 else 1)
    pictured = [step for own in histories for step, row in own.items() if "reconstructions.path" in row]
    assert pictured == [0, 6, 5, 6, 12, 18]
    runs = [record.run for own in records for record in own if record.WhichOneof("record_type") == "run"]
    assert runs[0].run_id == runs[1].run_id
    assert {(run.project, run.display_name, run.host) for run in runs} == {("itpn", "test/default", "")}
    kinds = {record.WhichOneof("record_type") for own in records for record in own}
    assert kinds <= {"header", "run", "history", "summary", "files", "preempting", "exit", "telemetry"}
    told = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert told["data"]["img_size"] == config.data.img_size
    assert told["optimizer"]["betas"] == list(config.optimizer.betas)
    for name in ("metrics.csv", "summary.json", "model.safetensors"):
        assert (second / "files" / name).read_bytes() == (folder / name).read_bytes()
        assert not (first / "files" / name).exists()

    client, run = find_mlflow_run(Path(config.output_dir))
    assert (run.info.status, run.info.run_name) == ("FINISHED", "test/default")
    for name in ("loss", "lr"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == list(range(1, 19))
        assert [point.value for point in history] == [float(row[name]) for row in rows.values()]
    assert run.data.params["data.img_size"] == str(config.data.img_size)
    assert run.data.params["task"] == "pretraining"
    files = Path(config.output_dir) / "mlartifacts" / run.info.run_id / "artifacts"
    for name in ("config.yaml", "metrics.csv", "summary.json", "model.safetensors"):
        assert (files / name).read_bytes() == (folder / name).read_bytes()
    steps = {int(path.name.split("+")[2]) for path in files.glob("images/reconstructions+step+*.png")}
    assert steps == {0, 5, 6, 12, 18}
    assert list(folder.glob("tensorboard/events*"))

    places = [folder / "wandb", folder / "tensorboard", files, Path(config.output_dir) / "mlflow.db"]
    before = [(path.name, path.stat().st_mtime_ns) for place in places for path in [place, *place.rglob("*")]]
    train(config, "test")  # complete: nothing is logged again
    assert before == [(path.name, path.stat().st_mtime_ns) for place in places for path in [place, *place.rglob("*")]]


def test_a_run_that_was_killed_before_its_last_files(settings, variables):
    config = settings(logger=("mlflow",), max_steps=4)
    folder = train(config, "test")
    client, run = find_mlflow_run(Path(config.output_dir))
    (uploaded,) = Path(config.output_dir).glob("mlartifacts/*/artifacts/summary.json")
    client.update_run(run.info.run_id, status="RUNNING")
    (folder / "summary.json").unlink()
    uploaded.unlink()
    train(config, "test")
    assert uploaded.read_bytes() == (folder / "summary.json").read_bytes()
    assert find_mlflow_run(Path(config.output_dir))[1].info.status == "FINISHED"


def test_a_stopped_run_and_one_that_starts_again(settings, variables, train_until, monkeypatch):
    """A stopped run is marked as such; without a checkpoint its steps are of another run, with settings of its own."""
    from itpn.training.checkpointing import Checkpointing

    config = settings(logger=("mlflow",))
    config.output_dir += " of 50%23"  # no part of an address means anything else
    with monkeypatch.context() as patched:
        patched.setattr(Checkpointing, "save", lambda self, batch: None)
        train_until(config, 2)
    client, run = find_mlflow_run(Path(config.output_dir))
    assert run.info.status == "KILLED"
    folder = train(replace(config, seed=1), "test")
    client.delete_run(run.info.run_id)
    client, other = find_mlflow_run(Path(config.output_dir))
    assert (other.info.status, other.data.params["seed"]) == ("FINISHED", "1")
    assert json.loads((folder / "loggers.json").read_text()) == {"mlflow": other.info.run_id}


@pytest.fixture
def proxy():
    """Where everything goes that wants to leave the machine; the hosts that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self):
            asked.append(self.path)
            self.send_error(502)

        do_GET = do_POST = do_CONNECT  # noqa: N815

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    yield dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address), asked
    server.shutdown()


def run_command(config, tmp_path: Path, *options: str, **more: str) -> subprocess.CompletedProcess:
    write_yaml(tmp_path / "run.yaml", "test", config)
    command = [sys.executable, "-m", "itpn", "train", tmp_path / "run.yaml", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_nothing_leaves_the_machine_unasked(settings, variables, proxy, tmp_path):
    """Both libraries send reports of their own use, offline as well, unless they are told not to."""
    addresses, asked = proxy
    config = settings(logger=("wandb", "mlflow"), max_steps=2)
    done = run_command(config, tmp_path, **addresses)
    assert (done.returncode, done.stderr) == (0, "")
    assert asked == []

    # with an account it is asked for; without a connection the run stays here
    account = {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}
    done = run_command(replace(config, name="online"), tmp_path, "--trainer.logger", "wandb", **addresses, **account)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wandb: offline, as there is no connection" in done.stdout
    assert asked
    assert list(Path(config.output_dir, "test/online/wandb").glob("offline-run-*"))


def test_two_processes_log_one_run(settings, variables, tmp_path):
    config = settings(logger=("wandb", "mlflow"), max_steps=2)
    done = run_command(config, tmp_path, "--trainer.devices", "2")
    assert (done.returncode, done.stderr) == (0, "")
    _, run = find_mlflow_run(Path(config.output_dir))
    assert run.info.status == "FINISHED"
    (folder,) = Path(config.output_dir, "test/default/wandb").glob("offline-run-*")
    assert list(read_history(read_wandb(folder))) == [0, 1, 2]


def test_wandb_is_killed(settings, variables, monkeypatch, tmp_path, capfd):
    """The process that writes for wandb: one line, and the run is what it would have been."""
    from itpn.training.loggers.wandb import WandbRun

    config = settings(logger=("wandb",), max_steps=6)
    inner = WandbRun.log_metrics

    def log(self, metrics, step):
        if step == 3:
            writers = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
            os.kill(int(writers.stdout.split()[-1]), signal.SIGKILL)
        inner(self, metrics, step)

    monkeypatch.setattr(WandbRun, "log_metrics", log)
    folder = train(config, "test")
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.count("wandb: stopped logging") == 1
    assert list(read_metrics(folder)) == [1, 2, 3, 4, 5, 6]
    assert json.loads((folder / "summary.json").read_text())["finished"]


def test_wandb_never_asks(settings, variables, capsys):
    variables["WANDB_MODE"] = "online"
    with pytest.raises(UserError, match="WANDB_MODE is online, but nobody is logged in: run `wandb login`"):
        train(settings(logger=("wandb",)), "test")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed(settings, tmp_path, monkeypatch, capsys, name):
    """A folder of that name, as wandb makes where it runs, is no package."""
    config = settings(logger=("tensorboard", name))
    write_yaml(tmp_path / "run.yaml", "test", config)
    (tmp_path / name).mkdir()
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert capsys.readouterr().err == (
        f"itpn: --trainer.logger {name} needs the package {name}: pip install 'itpn[{name}]'\n"
    )
    assert not Path(config.output_dir, "test").exists()


@pytest.fixture
def server(tmp_path):
    """A tracking server of MLflow's REST interface, as far as runs and metrics; what it got, and whether it answers."""
    got, state = [], {"up": True}
    info = {"run_id": "1f", "run_uuid": "1f", "run_name": "r", "experiment_id": "7"}
    info["artifact_uri"] = (tmp_path / "artifacts").as_uri()
    answers = {
        "experiments/get-by-name": {"experiment": {"experiment_id": "7", "name": "itpn"}},
        "runs/create": {"run": {"info": {**info, "status": "RUNNING"}, "data": {}}},
        "runs/get": {"run": {"info": {**info, "status": "RUNNING"}, "data": {}}},
        "runs/update": {"run_info": {**info, "status": "FINISHED"}},
        "runs/log-batch": {},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            call = self.path.partition("?")[0].partition("/mlflow/")[2]
            if state["up"]:
                got.append((call, sent))
            self.send_response(200 if state["up"] else 503)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(call, {})).encode())

        do_GET = do_PATCH = do_POST  # noqa: N815

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", got, state
    http.shutdown()


@pytest.mark.parametrize("back", [True, False], ids=["for a while", "for good"])
def test_a_server_that_is_gone(settings, variables, server, monkeypatch, capsys, back):
    """What it missed it gets later, in one go; if there is no later, a line says where it is."""
    address, got, state = server
    variables.update({"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"})
    monkeypatch.setattr(mlflow_logger, "SEND_EVERY", 0.0)
    monkeypatch.setattr(mlflow_logger, "RETRY_AFTER", 0.0)
    monkeypatch.setattr(mlflow_logger, "STALL", 1e9)
    config = settings(logger=("mlflow",))
    folder = RunFolder(config, "test")
    folder.path.mkdir(parents=True)
    run = MLflowRun(folder, config, False, Console())
    run.start()
    for step in range(1, 6):
        state["up"] = step < 3
        run.log_metrics({"loss": step / 2, "probe_knn": None}, step)
    state["up"] = back
    capsys.readouterr()
    run.close("finished")
    metrics = [metric for call, sent in got if call == "runs/log-batch" for metric in sent.get("metrics", [])]
    wanted = range(1, 6 if back else 3)
    assert [(m["key"], m["step"], m["value"]) for m in metrics] == [("loss", step, step / 2) for step in wanted]
    ended = [sent["status"] for call, sent in got if call == "runs/update"]
    assert ended == (["FINISHED"] if back else [])
    left = f"3 metrics and 0 files are in {folder.path} alone"
    assert capsys.readouterr().out.rstrip().endswith("" if back else left)


def test_a_run_resumes_without_its_server(settings, variables, server, monkeypatch, capsys):
    address, got, state = server
    variables.update({"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"})
    monkeypatch.setattr(mlflow_logger, "RETRY_AFTER", 0.0)
    monkeypatch.setattr(mlflow_logger, "STALL", 1e9)
    config = settings(logger=("mlflow",))
    folder = RunFolder(config, "test")
    folder.path.mkdir(parents=True)
    keep_run_id(folder, "mlflow", "1f")
    run, state["up"] = MLflowRun(folder, config, True, Console()), False
    run.start()
    assert "mlflow: logging failed" in capsys.readouterr().out
    state["up"] = True
    run.log_metrics({"loss": 0.5}, 7)
    run.close("stopped")
    told = {call: sent for call, sent in got if sent}
    assert told.keys() == {"runs/log-batch", "runs/update"}
    assert [(m["key"], m["step"], m["value"]) for m in told["runs/log-batch"]["metrics"]] == [("loss", 7, 0.5)]
    assert (told["runs/update"]["run_id"], told["runs/update"]["status"]) == ("1f", "KILLED")


def test_training_outlasts_its_server(settings, variables, server, monkeypatch, capfd):
    address, _, state = server
    variables.update({"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"})
    inner = MLflowRun.log_metrics

    def log(self, metrics, step):
        state["up"] = step < 2
        inner(self, metrics, step)

    monkeypatch.setattr(MLflowRun, "log_metrics", log)
    monkeypatch.setattr(mlflow_logger, "SEND_EVERY", 0.0)
    folder = train(settings(logger=("mlflow",), max_steps=4), "test")
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.count("mlflow: logging failed") == 2  # when it happened, and at the end
    assert json.loads((folder / "summary.json").read_text())["finished"]


def test_a_server_that_is_not_there(settings, variables, tmp_path):
    """A new run says so before its first step."""
    variables.update({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"})
    with pytest.raises(MachineError, match=r"--trainer\.logger mlflow: http://127\.0\.0\.1:9 cannot be used: "):
        train(settings(logger=("mlflow",)), "test")
    variables["MLFLOW_TRACKING_URI"] = "nonsense://host"
    with pytest.raises(UserError, match=r"--trainer\.logger mlflow: nonsense://host cannot be used: "):
        train(settings(logger=("mlflow",)), "test")


def test_a_full_disk_of_mlflow(settings, variables, tmp_path, capfd):
    """A real one, which fills up after the start."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root mounts a small disk, where it may")
    variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{disk}/mlflow.db"
    config = settings(logger=("mlflow",), max_steps=4)
    inner = MLflowRun.start

    def start(self):
        inner(self)
        size = sum(path.stat().st_blocks * 512 for path in disk.iterdir())
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

    try:
        with mock.patch.object(MLflowRun, "start", start):
            folder = train(config, "test")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    output = capfd.readouterr()
    assert output.err == ""
    assert "mlflow: logging failed" in output.out
    assert json.loads((folder / "summary.json").read_text())["finished"]
