"""Under torchrun: two processes count as one; after a killed rank the same line ends in the straight run's bits."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_deeplabv3
from conftest import ROOT
from test_resume import assert_runs_equal

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


def test_two_processes_validate_to_exactly_the_counts_of_one(straight, tmp_path):
    data, whole, _ = straight
    code = ("import json, os, train_deeplabv3 as t\n"
            f"def main(args): open('{tmp_path}/' + os.environ['RANK'], 'w').write(json.dumps(t.main(args)))\n"
            "t.utils.run(main, t.get_args_parser())\n")
    (tmp_path / "test.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    options = ["--data-path", data, "--output-dir", tmp_path / "out", *OPTIONS, "--test-only", "--weights",
               whole / "last.pth"]
    finish(torchrun(tmp_path / "test.py", *options))
    alone = train_deeplabv3.main(train_deeplabv3.get_args_parser().parse_args(list(map(str, options))))
    for rank in "01":
        figures = json.loads((tmp_path / rank).read_text())
        assert figures.pop("val_loss") == pytest.approx(alone["val_loss"], rel=1e-12)
        assert str(figures) == str({key: value for key, value in alone.items() if key != "val_loss"})
    assert sum(map(sum, alone["counts"])) > 0


def kill_and_finish(straight, output, seed):
    data, whole, seconds = straight
    draw = random.Random(seed)
    line = ["train_deeplabv3.py", "--data-path", data, "--output-dir", output, *OPTIONS, "--resume", "auto"]
    for _ in range(2):
        process = torchrun(*line)
        time.sleep(draw.uniform(seconds / 3, seconds * 0.9))
        found = workers(process)
        if len(found) == 2 and process.poll() is None:
            os.kill(found[draw.randrange(2)], signal.SIGKILL)
        process.communicate(timeout=240)
    finish(torchrun(*line))
    assert_runs_equal(whole, output)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
def test_eleven_more_runs_with_killed_ranks(straight, tmp_path, seed):
    kill_and_finish(straight, tmp_path / "run", seed)


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


# --- EfficientSAM: no batch norm, so processes and batch size may stand in for each other ---

SAM = "--model demo --weights none --image-size 64 -j 0 --epochs 2 --lr 0.001 --device cpu".split()


def test_one_process_with_two_images_trains_as_two_with_one(tmp_path):
    """Nine images to train on: the last step has one, and the second process only keeps step.

    Each of the two has a torchrun of its own, as on two hosts, and the article's options.
    """
    import demo_data
    import train_efficientsam_ddp
    data = demo_data.write("objects", tmp_path / "data", 11)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
              "--rdzv-id=test", "--local-addr=localhost"]
    article = ("-task_name x -pretrained_checkpoint none -world_size 2 -node_rank 0 -init_method env:// "
               "-bucket_cap_mb 25")
    hosts = [torchrun("train_efficientsam_ddp.py", "-i", data, "-work_dir", tmp_path / "two", *article.split(), *SAM,
                      "-batch_size", 1, "--limit", 9, launch=launch) for _ in range(2)]
    output = "".join(map(finish, hosts))
    assert output.count("cpu x 2") == 1 and "demo: " in output  # the first rank of all hosts prints
    train_efficientsam_ddp.main(train_efficientsam_ddp.get_args_parser().parse_args(list(map(str, [
        "--data-path", data, "--output-dir", tmp_path / "one", *SAM, "-b", 2, "--limit", 9]))))
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in ("one", "two"))
    apart = torch.cat([(one[key] - two[key]).abs().flatten() for key in one
                       if not key.endswith(("k_proj.bias", "qkv.bias"))])  # whose true gradient is zero
    assert (apart > 1e-4).double().mean() < 1e-4  # Adam moves weights of tiny gradients by the sign of rounding
    rows = [[line.split(",") for line in (tmp_path / name / "log.csv").read_text().splitlines()]
            for name in ("one", "two")]
    column = rows[0][0].index("loss")
    for a, b in zip(rows[0][1:], rows[1][1:]):
        assert float(a[column]) == pytest.approx(float(b[column]), abs=1e-5)


@pytest.fixture(scope="module")
def straight_sam(tmp_path_factory):
    """The command line and the folder of a run of two processes that nothing stopped."""
    import demo_data
    folder = tmp_path_factory.mktemp("sam")
    data = demo_data.write("objects", folder / "data", 11)
    line = ["train_efficientsam_ddp.py", "--data-path", data, *SAM, "-b", 1, "--epochs", 3, "--save-every", 1]
    finish(torchrun(*line, "--output-dir", folder / "run"))
    return line, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("restarts", [0, 3])
def test_efficientsam_after_a_killed_rank_ends_in_the_straight_runs_bits(straight_sam, tmp_path, seed, restarts):
    """By the same line again, and by torchrun itself with --max-restarts."""
    line, whole = straight_sam
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
    assert_runs_equal(whole, tmp_path / "run")


# --- SAM 2: clips of different prompts, so each process uses other parts of the net ---

SAM2 = ("--model demo --weights none --image-size 64 --num-frames 3 --multiplier 1 --num-correction-points 2 -j 0 "
        "--epochs 2 --lr 0.001 --vision-lr 0.001 --device cpu --save-every 1").split()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    import demo_data
    demo_data.write_clips(tmp_path_factory.mktemp("videos") / "data", 9, size=64, num_frames=5)  # 7 to train on
    return tmp_path_factory.getbasetemp() / "videos0/data"


def test_one_process_with_two_clips_trains_as_two_with_one(videos, tmp_path):
    """Without dropout, whose numbers each process draws itself. In the last step the second process only keeps step."""
    import train_sam2
    options = ["--data-path", videos, *SAM2, "--dropout", 0, "--drop-path", 0]
    finish(torchrun("train_sam2.py", *options, "-b", 1, "--output-dir", tmp_path / "two"))
    train_sam2.main(train_sam2.get_args_parser().parse_args(list(map(str, [
        *options, "-b", 2, "--output-dir", tmp_path / "one"]))))
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("one", "two"))
    apart = torch.cat([(value - two["model"][key]).abs().flatten() for key, value in one["model"].items()
                       if not key.endswith("k_proj.bias")])  # whose true gradient is zero
    assert (apart > 1e-4).double().mean() < 1e-4  # Adam moves weights of tiny gradients by the sign of rounding
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("one", "two")]
    for name in ("loss", "pass_focal", "pass_dice", "pass_iou", "pass_score", "val_jf", "copied_jf"):
        column = logs[0][0].split(",").index(name)
        for a, b in zip(logs[0][1:], logs[1][1:]):
            assert float(a.split(",")[column]) == pytest.approx(float(b.split(",")[column]), abs=2e-3), name
    assert one["before"]["per_video"].keys() == two["before"]["per_video"].keys()


@pytest.mark.slow
def test_sam2_after_a_killed_rank_ends_in_the_straight_runs_bits(videos, tmp_path):
    line = ["train_sam2.py", "--data-path", videos, *SAM2, "-b", 1]
    finish(torchrun(*line, "--epochs", 3, "--output-dir", tmp_path / "whole"))
    line += ["--epochs", 3, "--output-dir", tmp_path / "run", "--resume", "auto"]
    process = torchrun(*line)
    while not (tmp_path / "run/last.pth").exists():
        time.sleep(0.05)
    found = workers(process)
    assert len(found) == 2 and process.poll() is None
    os.kill(found[1], signal.SIGKILL)
    process.communicate(timeout=240)
    finish(torchrun(*line))
    assert_runs_equal(tmp_path / "whole", tmp_path / "run")
