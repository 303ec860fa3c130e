"""Under torchrun: two processes count as one; after a killed rank the same line ends in the straight run's bits."""
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

import train_deeplabv3
import train_unet
import utils
from conftest import ROOT
from test_resume import SMALL, TIMES, assert_runs_equal

SAM2 = SMALL["train_sam2"][2] + " --dropout 0 --drop-path 0"  # whose numbers each process draws itself
CASES = {  # script: kind of drawn data, how many, options, batch size of each of two processes
    "train_unet": ("cells", 10, "--arch UNet --image-size 32 --lr 0.01", 1),
    "train_deeplabv3": ("scenes", 10, SMALL["train_deeplabv3"][2], 2),  # which refuses one image
    "train_efficientsam": (*SMALL["train_efficientsam"], 1),
    "train_efficientsam_ddp": (*SMALL["train_efficientsam"], 1),
    "finetune_sam_decoder": (*SMALL["finetune_sam_decoder"], 1),
    "train_sam2": ("clips", 9, SAM2, 1),
    "pretrain_sami": (*SMALL["pretrain_sami"], 1),
}
OPTIONS = ("--backbone demo --weights none --num-classes 3 --base-size 48 --crop-size 48 --lr 0.01 -b 2 "
           "-j 0 --epochs 3 --save-every 1 --device cpu").split()


def torchrun(script, *options, launch=("--standalone", "--nproc_per_node=2"), **variables):
    """torchrun in a process group of its own, as a user on one machine starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", *launch]
    return subprocess.Popen([*command, str(script), *map(str, options)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **variables})


def finish(process, code=0):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def workers(process):
    """Process ids of the script's own processes, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [int(one[5:]) for one in variables if one.startswith(b"RANK=")]
        if parent == process.pid and rank:
            found[rank[0]] = int(path.name)
    return found


def freeze_statistics(patch):
    """Batch norm with its statistics frozen, no dropout: a step then does not depend on how images lie in batches."""
    def forward(self, x):
        return torch.nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False,
                                              self.momentum, self.eps)
    patch(torch.nn.BatchNorm2d, "forward", forward)
    patch(torch.nn.Dropout, "forward", lambda self, x: x)


def command(name, data, batch_size):
    options = [*CASES[name][2].split(), "-j", "0", "--epochs", "3", "--device", "cpu"]
    return ["--data-path", str(data), "-b", str(batch_size), *options]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder that two_processes.py fills."""
    import demo_data
    folder, jobs = tmp_path_factory.mktemp("two"), {}
    for name, (kind, count, _, batch_size) in CASES.items():
        jobs[name] = command(name, demo_data.write(kind, folder / name / "data", count), batch_size)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    finish(torchrun("tests/two_processes.py", folder))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_with_twice_the_batch(two_processes, name, monkeypatch):
    """Seven images of objects to train on: in an epoch's last step the second process only keeps step."""
    freeze_statistics(monkeypatch.setattr)
    folder, script = two_processes / name, import_module(name)
    script.main(script.get_args_parser().parse_args(
        [*command(name, folder / "data", 2 * CASES[name][3]), "--output-dir", str(folder / "one")]))
    one, two = (torch.load(folder / run / "last.pth", weights_only=True) for run in ("one", "whole"))
    apart = torch.cat([(value - two["model"][key]).abs().flatten() for key, value in one["model"].items()
                       if not key.endswith(("k_proj.bias", "qkv.bias"))])  # whose true gradient is zero
    assert (apart > 1e-4).double().mean() < 1e-4  # Adam moves weights of tiny gradients by the sign of rounding
    for row, other in zip(log_rows(folder / "one"), log_rows(folder / "whole"), strict=True):
        assert row.keys() == other.keys()
        for column in row.keys() - TIMES:
            assert float(row[column]) == pytest.approx(float(other[column]), rel=5e-3, abs=2e-3, nan_ok=True), column


def log_rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_images_that_cannot_be_shared_out_are_left_out(monkeypatch):
    """U-Net: no process may have a step more than another, which would wait for it."""
    monkeypatch.setattr(utils, "ranks", lambda: (0, 2))
    args = train_unet.get_args_parser().parse_args(["--data-path", "x"])
    assert [train_unet.count_trained(count, args) for count in (8, 9)] == [8, 8]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_in_the_same_bits_after_a_stop(two_processes, name):
    assert_runs_equal(two_processes / name / "whole", two_processes / name / "stopped")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_validate_to_exactly_the_figures_of_one(two_processes, name, monkeypatch):
    freeze_statistics(monkeypatch.setattr)
    folder, script = two_processes / name, import_module(name)
    alone = script.main(script.get_args_parser().parse_args(
        [*command(name, folder / "data", 1 + CASES[name][3]), "--output-dir", str(folder / "alone"), "--test-only",
         "--weights", str(folder / "whole/last.pth")]))
    for rank in (0, 1):
        figures = json.loads((folder / f"figures_{rank}.json").read_text())
        assert str(figures) == str(json.loads(json.dumps(alone)))  # text, as nan is not nan


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Drawn data, and the folder and seconds of a two-process run that nothing stopped."""
    import demo_data
    folder = tmp_path_factory.mktemp("torchrun")
    data = demo_data.write("scenes", folder / "data", 11)  # eight to train on: two steps of two processes x two
    started = time.time()
    output = finish(torchrun("train_deeplabv3.py", "--data-path", data, "--output-dir", folder / "run", *OPTIONS))
    assert output.count("parameters trained") == 1 and "cpu x 2" in output  # the first rank alone prints
    return data, folder / "run", time.time() - started


def test_the_same_line_after_sigterm_and_a_killed_rank_ends_in_the_straight_runs_bits(straight, tmp_path):
    data, whole, _ = straight
    line = ["train_deeplabv3.py", "--data-path", data, "--output-dir", tmp_path / "run", *OPTIONS, "--save-every", 0,
            "-j", 2, "--resume", "auto"]  # what is saved is saved on the signal
    process = start_training(line)
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "stopped by SIGTERM" in output
    assert torch.load(tmp_path / "run/last.pth", weights_only=True)["epoch"] < 3
    line += ["--save-every", 1]
    saved = (tmp_path / "run/last.pth").stat().st_mtime_ns
    process = start_training(line)
    while (tmp_path / "run/last.pth").stat().st_mtime_ns == saved and process.poll() is None:
        time.sleep(0.01)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(120) == 1
    finish(torchrun(*line))
    assert_runs_equal(whole, tmp_path / "run")


def start_training(line):
    """torchrun, as far as the line printed before the first step."""
    process = torchrun(*line)
    for text in process.stdout:
        if "parameters trained" in text:
            return process
    raise AssertionError(process.wait())


def test_a_mistake_is_one_line_with_its_remedy_and_no_traceback(straight, tmp_path):
    data, whole, _ = straight
    output = finish(torchrun("train_deeplabv3.py", "--data-path", data, "--output-dir", whole, *OPTIONS), code=1)
    assert "train_deeplabv3.py: error: " in output and "there is a run here" in output
    assert 'train_deeplabv3.py", line' not in output  # the traceback is torchrun's own


def test_another_number_of_processes_is_refused_on_resuming(straight):
    data, whole, _ = straight
    args = ["--data-path", data, "--output-dir", whole, *OPTIONS, "--resume", "auto"]
    with pytest.raises(train_deeplabv3.utils.InputError, match="torchrun --nproc_per_node 2, now 1"):
        train_deeplabv3.main(train_deeplabv3.get_args_parser().parse_args(list(map(str, args))))


def test_two_hosts_and_the_articles_options_give_the_bits_of_one_host(two_processes, tmp_path):
    """Each of the two processes has a torchrun of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
              "--rdzv-id=test", "--local-addr=localhost"]
    article = ("-task_name x -pretrained_checkpoint none -world_size 2 -node_rank 0 -init_method env:// "
               "-bucket_cap_mb 25 -batch_size 1 -num_epochs 3").split()
    options = CASES["train_efficientsam_ddp"][2].replace("--weights none", "").split()
    folder = two_processes / "train_efficientsam_ddp"
    hosts = [torchrun("train_efficientsam_ddp.py", "-i", folder / "data", "-work_dir", tmp_path / "run", *article,
                      *options, "-j", 0, "--device", "cpu", launch=launch) for _ in range(2)]
    output = "".join(map(finish, hosts))
    assert output.count("cpu x 2") == 1 and "demo: " in output  # the first rank of all hosts prints
    assert_runs_equal(folder / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_every_script_after_a_killed_rank_ends_in_the_straight_runs_bits(name, two_processes, tmp_path, seed, restarts):
    """By the same line again, and by torchrun itself with --max-restarts."""
    line = [f"{name}.py", *command(name, two_processes / name / "data", CASES[name][3]), "--save-every", 1]
    finish(torchrun(*line, "--output-dir", tmp_path / "whole"))
    line, draw = [*line, "--output-dir", tmp_path / "run", "--resume", "auto"], random.Random(seed)
    process = torchrun(*line, launch=["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"],
                       TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    while not (tmp_path / "run/last.pth").exists():
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 4))
    found, rank = workers(process), draw.randrange(2)
    if rank in found:  # else the run was through before
        os.kill(found[rank], signal.SIGKILL)
    output = process.communicate(timeout=240)[0]
    assert (process.returncode == 0) == (restarts > 0 or rank not in found), output
    if not restarts:
        finish(torchrun(*line))
    assert_runs_equal(tmp_path / "whole", tmp_path / "run")
