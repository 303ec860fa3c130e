"""Interrupted runs end in the straight run's bits: SIGKILL, SIGTERM and Ctrl-C at random moments, real processes."""
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from conftest import ROOT

TIMES = {"seconds", "images_per_s", "peak_mb"}  # the columns of log.csv that no two runs share
SMALL = {  # script: kind of drawn data, how many, options
    "train_unet": ("cells", 9, "--arch UNet --image-size 32 --optimizer Adam"),
    "train_deeplabv3": ("scenes", 9, "--backbone demo --weights none --num-classes 3 --base-size 48 "
                                     "--crop-size 48 --lr 0.01"),
    "train_efficientsam": ("objects", 9, "--model demo --image-size 64 --lr 0.001"),
    "finetune_sam_decoder": ("rings", 9, "--model demo --weights none --image-size 64 --lr 0.001 --year 2012 --flip"),
    "train_sam2": ("clips", 9, "--model demo --weights none --image-size 64 --lr 0.001 --vision-lr 0.001 "
                               "--num-frames 3 --multiplier 1 --num-correction-points 2"),
    "pretrain_sami": ("objects", 9, "--model demo --teacher demo --teacher-weights none --teacher-size 64 "
                                    "--image-size 64 --decoder-dim 32 --decoder-depth 1 --lr 2"),  # with crops
}


class Case(NamedTuple):
    """A script, its drawn data, the folder of a run that nothing stopped, that run's seconds."""
    name: str
    data: Path
    whole: Path
    seconds: float

    def command(self, output, *more):
        return ["--data-path", str(self.data), "--output-dir", str(output), "-b", "2", "--epochs", "3", "--save-every",
                "1", "--device", "cpu", *SMALL[self.name][2].split(), *map(str, more)]

    def run(self, output, *more):
        script = import_module(self.name)
        return script.main(script.get_args_parser().parse_args(self.command(output, *more)))

    def start(self, output, *more):
        """The script in a process group of its own, as far as the line printed before the first step."""
        process = subprocess.Popen([sys.executable, f"{self.name}.py", *self.command(output, *more)], cwd=ROOT,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        for line in process.stdout:
            if "parameters trained" in line:
                return process
        raise AssertionError(process.stderr.read())


def assert_same(a, b):
    """Nested dicts and lists equal to the last bit; paths and timings aside."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"output_dir", "resume", "workers"}:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def assert_runs_equal(one, other):
    for name in ("last.pth", "best.pth"):
        assert_same(*(torch.load(folder / name, weights_only=True) for folder in (one, other)))
    logs = []
    for folder in (one, other):
        with open(folder / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        logs.append([{key: value for key, value in row.items() if key not in TIMES} for row in rows])
    assert logs[0] == logs[1] and len(logs[0]) == 3


@pytest.fixture(scope="module", params=SMALL)
def straight(request, tmp_path_factory):
    import demo_data
    folder = tmp_path_factory.mktemp("straight")
    kind, count, _ = SMALL[request.param]
    data = demo_data.write(kind, folder / "data", count)  # 7 to train on: U-Net has three batches of two and one of one
    case = Case(request.param, data, folder / "run", 0)
    started = time.time()
    case.run(folder / "run", "-j", 0)
    return case._replace(seconds=time.time() - started)


def interrupt_and_finish(straight, output, sent, seed):
    """Interrupts a run at moments drawn from seed until one run is through; asserts the end's bits."""
    draw = random.Random(seed)
    workers, interruptions = draw.choice([0, 2]), 0
    waits = [straight.seconds / 3, straight.seconds / 3]
    if straight.name == "finetune_sam_decoder":
        waits = [0.3, *waits]  # the first while embeddings are made
    while True:
        process = straight.start(output, "-j", workers, "--resume", "auto")
        try:
            process.wait(draw.uniform(0, waits[interruptions]) if interruptions < len(waits) else 120)
            if interruptions or process.returncode:
                break  # it was through before the next signal
            shutil.rmtree(output)  # the straight run had less of the machine: sooner
            waits = [wait / 2 for wait in waits]
            continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, sent)  # to the loader processes too, as a terminal or a cluster does
            interruptions += 1
        code = process.wait(60)
        if code == 0:
            break  # the signal came after the last step
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
        through = "\nbest " in process.stdout.read()  # Python, as it exits, has no handlers any more
        assert code == expected or through and code == -sent, process.stderr.read()
    assert process.returncode == 0 and interruptions, process.stderr.read()
    assert_runs_equal(straight.whole, output)


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def only(request, straight):
    """only("train_unet"): of this test's processes the named scripts' run always, the others' with --slow."""
    def check(*names):
        if straight.name not in names and not request.config.getoption("--slow"):
            pytest.skip("slow: run with --slow")
    return check


def test_a_run_stopped_at_random_moments_ends_in_the_straight_runs_bits(straight, tmp_path, only):
    only("train_efficientsam", "finetune_sam_decoder")
    seed = list(SMALL).index(straight.name)
    interrupt_and_finish(straight, tmp_path / "run", SIGNALS[seed % 3], seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 23))
def test_twenty_more_stopped_runs(straight, tmp_path, seed):
    interrupt_and_finish(straight, tmp_path / "run", random.Random(seed).choice(SIGNALS), seed)


def test_sigterm_in_the_first_step_saves_it_and_exits_143(straight, tmp_path, only):
    only("train_deeplabv3")
    process = straight.start(tmp_path / "run", "-j", 0)
    process.terminate()
    assert process.wait(60) == 143
    said = process.stderr.read()  # older versions warn of this and that before
    assert said.endswith(f"{straight.name}.py: stopped by SIGTERM\n") and "Traceback" not in said
    checkpoint = torch.load(tmp_path / "run/last.pth", weights_only=True)
    assert checkpoint["epoch"] == 0 and (checkpoint["step"] >= 1 or "before" not in checkpoint)
    straight.run(tmp_path / "run", "-j", 0, "--resume", "auto")
    assert_runs_equal(straight.whole, tmp_path / "run")


def test_a_signal_to_the_whole_group_ends_no_loader_before_its_step_is_saved(straight, tmp_path, only):
    only("train_unet")
    sent, code = (signal.SIGINT, 130) if straight.name == "train_unet" else (signal.SIGTERM, 143)
    process = straight.start(tmp_path / "run", "-j", 2, "--save-every", 0)
    time.sleep(0.5)
    os.killpg(process.pid, sent)
    assert process.wait(60) == code, process.stderr.read()
    # torch 2.10 adds an ignored exception where a loader process was only just starting
    assert process.stderr.read().endswith(f"{straight.name}.py: stopped by {sent.name}\n")
    straight.run(tmp_path / "run", "-j", 0, "--save-every", 0, "--resume", "auto")


def test_two_workers_give_the_bits_of_none(straight, tmp_path):
    straight.run(tmp_path / "run", "-j", 2)
    assert_runs_equal(straight.whole, tmp_path / "run")


def test_a_stop_during_validation_resumes_there(straight, tmp_path, monkeypatch):
    import utils
    with monkeypatch.context() as patch:
        def stop(*args):
            raise utils.Stopped
        patch.setattr(import_module(straight.name), "evaluate", stop)
        with pytest.raises(utils.Stopped):
            straight.run(tmp_path / "run", "-j", 0)
    straight.run(tmp_path / "run", "-j", 0, "--resume", "auto")
    assert_runs_equal(straight.whole, tmp_path / "run")


def test_another_seed_gives_other_bits(straight, tmp_path, only):
    """The comparison above can fail."""
    only("train_efficientsam", "finetune_sam_decoder")
    straight.run(tmp_path / "run", "-j", 0, "--seed", 1)
    with pytest.raises(AssertionError):
        assert_runs_equal(straight.whole, tmp_path / "run")


def test_resuming_what_is_finished_changes_nothing(straight, tmp_path, capsys):
    shutil.copytree(straight.whole, tmp_path / "run")
    before = (tmp_path / "run/log.csv").read_text()
    figures = straight.run(tmp_path / "run", "-j", 0, "--resume", "auto")
    assert (tmp_path / "run/log.csv").read_text() == before and len(figures) > 2
