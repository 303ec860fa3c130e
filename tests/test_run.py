"""What utils.Run does for every training script: bad steps, stopping early, files, what is resumed and what refused.

train_unet.py with a thin net stands for all of them.
"""
import builtins
import io
import math
import os
import shutil
import signal
import subprocess
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import train_unet
import utils
from test_resume import assert_same
from test_train_unet import SMALL, Scaler, refuses, thin, train  # noqa: F401 (thin: a fixture of all tests)


def test_early_stopping_counts_from_the_best_epoch(cells, tmp_path, capsys):
    train(cells, tmp_path / "run", "--epochs", 9, "--lr", 0, "--early_stopping", 2)
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 1 + 3  # lr 0: only epoch 1 improves (BN settles)
    assert "early stopping" in capsys.readouterr().out


def test_a_nan_loss_is_skipped_and_counted_and_weights_stay_finite(cells, tmp_path, monkeypatch, capsys):
    calls, true_criterion = [], train_unet.criterion

    def criterion(outputs, mask, loss):
        calls.append(1)
        return true_criterion(outputs, mask, loss) * (float("nan") if len(calls) == 2 else 1)
    monkeypatch.setattr(train_unet, "criterion", criterion)
    figures = train(cells, tmp_path / "run", "--epochs", 1, "-b", 2)
    state = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values()) and math.isfinite(figures["val_loss"])
    assert "1 of 4 steps skipped" in capsys.readouterr().out
    assert state["conv0_0.bn1.num_batches_tracked"] == 3  # the running statistics of the bad step are taken back too


def test_ten_nan_losses_in_a_row_end_the_run_naming_the_images(cells, tmp_path, monkeypatch):
    true_criterion = train_unet.criterion
    monkeypatch.setattr(train_unet, "criterion", lambda *a: true_criterion(*a) * float("nan"))
    with pytest.raises(utils.InputError, match=r"ten times in a row, last on cell_\d"):
        train(cells, tmp_path / "run", "--epochs", 9, "-b", 4)  # two steps an epoch: the count goes on across epochs


def test_gradients_are_those_of_the_mean_then_clipped_and_a_falling_scale_is_no_bad_step():
    model = torch.nn.Linear(2, 1, bias=False)
    run = SimpleNamespace(parts={"model": model}, progress=Counter(), args=Namespace(world_size=1), items=[("x",)],
                          buffers=[], device=torch.device("cpu"), scaler=torch.amp.GradScaler("cpu", enabled=False))
    optimizer = torch.optim.SGD(model.parameters(), 1)
    for clip_grad, expected in ((0, [3, 4]), (10, [3, 4]), (1, [0.6, 0.8])):
        model.weight.grad = torch.tensor([[6.0, 8.0]])
        assert utils.Run.finish_gradient(run, optimizer, 5.0, 2, clip_grad)
        assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-4)
    run.scaler = Scaler()  # of fp16: too large a scale makes gradients infinite, not the loss
    for loss, bad_steps in ((5.0, 0), (math.nan, 1)):
        model.weight.grad = torch.tensor([[math.inf, 8.0]])
        assert not utils.Run.finish_gradient(run, optimizer, loss, 2) and run.progress["bad_steps"] == bad_steps


def test_a_stop_among_accumulated_batches_resumes_to_the_same_bits(cells, tmp_path, monkeypatch):
    more = ["--epochs", 1, "-b", 1, "--accumulate", 2]  # four steps
    train(cells, tmp_path / "a", *more)
    finish_gradient = utils.Run.finish_gradient

    def stop(run, *args):
        if run.progress["step"] == 1:
            utils.remember_signal(signal.SIGTERM, None)
        return finish_gradient(run, *args)
    with monkeypatch.context() as patch, pytest.raises(utils.Stopped):
        patch.setattr(utils.Run, "finish_gradient", stop)
        train(cells, tmp_path / "b", *more)
    utils._signals.clear()
    assert torch.load(tmp_path / "b/last.pth", weights_only=True)["step"] == 2
    train(cells, tmp_path / "b", *more, "--resume", "auto")
    assert_same(*[torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "ab"])


def test_an_earlier_run_is_not_overwritten_unless_asked(cells, tmp_path):
    train(cells, tmp_path / "run", "--epochs", 1)
    before = (tmp_path / "run/last.pth").read_bytes()
    with pytest.raises(utils.InputError, match="--resume auto.*--overwrite"):
        train(cells, tmp_path / "run", "--epochs", 1)
    assert (tmp_path / "run/last.pth").read_bytes() == before
    train(cells, tmp_path / "run", "--epochs", 2, "--overwrite")
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 3


def test_another_split_of_the_same_images_is_not_resumed(cells, tmp_path):
    names = [f"cell_{i}" for i in range(10)]
    for file, first in (("a.json", 7), ("b.json", 6)):
        (tmp_path / file).write_text(utils.json.dumps({"train": names[:first], "val": names[first:]}))
    train(cells, tmp_path / "run", "--epochs", 1, "--split", tmp_path / "a.json")
    with pytest.raises(utils.InputError, match="images of data hash"):
        train(cells, tmp_path / "run", "--epochs", 2, "--split", tmp_path / "b.json", "--resume", "auto")


def test_a_run_is_continued_by_its_folders_name(cells, tmp_path):
    train(cells, tmp_path / "run", "--epochs", 1)
    train(cells, tmp_path / "run", "--epochs", 2, "--resume", tmp_path / "run")
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 3


def test_resuming_from_bare_weights_or_into_another_run(cells, tmp_path):
    train(cells, tmp_path / "a", "--epochs", 1)
    train(cells, tmp_path / "b", "--epochs", 1)
    with pytest.raises(utils.InputError, match="model.pth: not a run's last.pth.*--weights"):
        train(cells, tmp_path / "a", "--epochs", 2, "--resume", tmp_path / "a/model.pth")
    with pytest.raises(utils.InputError, match="there is a run here"):
        train(cells, tmp_path / "b", "--epochs", 2, "--resume", tmp_path / "a/last.pth")
    train(cells, tmp_path / "c", "--epochs", 2, "--resume", tmp_path / "a/last.pth")


def test_the_best_so_far_comes_along_into_another_folder(cells, tmp_path, capsys):
    train(cells, tmp_path / "a", "--epochs", 1, "--lr", 0)
    best = torch.load(tmp_path / "a/best.pth", weights_only=True)
    for source in ("a/last.pth", "a"):
        output = tmp_path / source.replace("/", "_")
        train(cells, output, "--epochs", 1, "--lr", 0, "--resume", tmp_path / source)
        assert_same(best, torch.load(output / "best.pth", weights_only=True))
        assert (output / "model.pth").read_bytes() == (tmp_path / "a/model.pth").read_bytes()
    whole = (tmp_path / "a/best.pth").read_bytes()
    for number, spoilt in enumerate(({**best, "best": 2.0}, best["model"], [1], None)):  # of another run, or damaged
        (tmp_path / "a/best.pth").write_bytes(whole[:-50])
        if spoilt:
            torch.save(spoilt, tmp_path / "a/best.pth")
        train(cells, tmp_path / f"b{number}", "--epochs", 1, "--lr", 0, "--resume", tmp_path / "a")
        assert not (tmp_path / f"b{number}/best.pth").exists()
    assert "best weights so far are not all copied from " in capsys.readouterr().out


def test_a_run_that_fails_at_once_in_its_new_folder_goes_on_there(cells, tmp_path, monkeypatch):
    train(cells, tmp_path / "a", "--epochs", 1)
    more = ["--epochs", 2, "--resume"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_unet, "train_one_epoch", lambda *args: 1 / 0)
        train(cells, tmp_path / "b", *more, tmp_path / "a")
    train(cells, tmp_path / "b", *more, "auto")
    train(cells, tmp_path / "a", *more, "auto")
    assert_same(*[torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "ab"])


def test_a_last_pth_of_format_1_is_refused_in_one_line_and_its_weights_load(cells, tmp_path):
    train(cells, tmp_path / "a", "--epochs", 1)
    checkpoint = torch.load(tmp_path / "a/last.pth", weights_only=True)
    utils.save_checkpoint(tmp_path / "old.pth", {**checkpoint, "format": 1, "best": {"val_iou": 0.5, "epoch": 1}})
    refuses(cells, "--resume", "another version of these scripts", "--weights", more=["--resume", tmp_path / "old.pth"])
    figures = [train(cells, tmp_path / "x", "--test-only", "--weights", path)
               for path in (tmp_path / "old.pth", tmp_path / "a/best.pth")]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("optimizer", [{}, [1], {"state": {}, "param_groups": []}])
def test_a_last_pth_whose_optimizer_does_not_fit_is_refused(cells, tmp_path, optimizer):
    train(cells, tmp_path / "a", "--epochs", 1)
    checkpoint = torch.load(tmp_path / "a/last.pth", weights_only=True)
    utils.save_checkpoint(tmp_path / "a/last.pth", {**checkpoint, "optimizer": optimizer})
    with pytest.raises(utils.InputError, match="--resume auto: its optimizer does not fit .*--weights"):
        train(cells, tmp_path / "a", "--epochs", 2, "--resume", "auto")


def test_best_pth_holds_the_weights_and_what_predicting_needs_and_no_more(cells, tmp_path):
    train(cells, tmp_path / "run", "--epochs", 1)
    best, last = (torch.load(tmp_path / f"run/{name}.pth", weights_only=True) for name in ("best", "last"))
    assert last.keys() - best.keys() == {"optimizer", "lr_scheduler", "scaler"} and not best.keys() - last.keys()
    assert (tmp_path / "run/best.pth").stat().st_size < 0.36 * (tmp_path / "run/last.pth").stat().st_size
    refuses(cells, "not a run's last.pth", "--weights", more=["--resume", tmp_path / "run/best.pth"])


def test_nan_is_never_the_best(cells, tmp_path, monkeypatch):
    true_evaluate, ious = train_unet.evaluate, iter([math.nan, 0.2, math.nan])
    monkeypatch.setattr(train_unet, "evaluate", lambda *a: {**true_evaluate(*a), "val_iou": next(ious)})
    figures = train(cells, tmp_path / "run", "--epochs", 3, "--limit", 2)
    best = torch.load(tmp_path / "run/best.pth", weights_only=True)
    assert figures["best_val_iou"] == 0.2 and best["best_epoch"] == 2


def test_resuming_with_other_settings_is_refused_by_name(cells, tmp_path):
    train(cells, tmp_path / "run", "--epochs", 1)
    for more, word in ((["--lr", 0.5], "--lr 0.001, now 0.5"), (["-b", 2], "--batch-size 4, now 2"),
                       (["--seed", 3], "--seed 41")):
        with pytest.raises(utils.InputError, match=word):
            train(cells, tmp_path / "run", "--epochs", 2, "--resume", "auto", *more)
    (cells / "images/cell_0.png").unlink(), (cells / "masks/0/cell_0.png").unlink()
    with pytest.raises(utils.InputError, match="images of data hash"):
        train(cells, tmp_path / "run", "--epochs", 2, "--resume", "auto")


def test_a_mistake_found_in_a_loader_process_is_one_line_too(cells, tmp_path, monkeypatch, script):
    """A file that is spoilt after the check: read by a worker, named by the script, exit status 2."""
    code = f"""
import sys, train_unet, utils
utils.check_items = lambda check, items, args: [True]
sys.argv = ["train_unet.py", "--data-path", {str(cells)!r}, "--output-dir", {str(tmp_path / 'run')!r},
            *{SMALL!r}, "-j", "2", "--epochs", "1"]
utils.run(train_unet.main, train_unet.get_args_parser())"""
    (cells / "images/cell_1.png").write_bytes(b"spoilt")
    done = script("-c", code)
    assert done.returncode == 2
    assert done.stderr.strip() == f"train_unet.py: error: {cells}/images/cell_1.png: not an image that can be read"


def test_gradients_of_two_threads_have_the_same_bits_each_time(cells, tmp_path):
    """Those of x[index], where an index stands more than once: threads would add them in any order."""
    train(cells, tmp_path / "run", "--sanity-check")
    torch.set_num_threads(2)
    try:
        index, weight = torch.arange(3).repeat(40), torch.randn(120, 30_000)
        gradients = []
        for _ in range(10):
            x = torch.zeros(3, 30_000, requires_grad=True)
            (x[index] * weight).sum().backward()
            gradients.append(x.grad)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# --- What goes wrong outside ---

@pytest.fixture
def straight(cells, tmp_path):
    """last.pth after two epochs."""
    train(cells, tmp_path / "straight", "--epochs", 2)
    return torch.load(tmp_path / "straight/last.pth", weights_only=True)


def child(cells, folder, before, *more):
    """Code of a process that trains as `train` does, after some lines."""
    words = ["train_unet.py", "--data-path", str(cells), "--output-dir", str(folder), *SMALL, "--epochs", "2", *more]
    return f"""
import os, signal, sys
import nets.unet, torch, train_unet, utils
nets.unet.CHANNELS = (8, 16, 32, 64, 128)
torch.set_num_threads(1)
{before}
sys.argv = {words!r}
utils.run(train_unet.main, train_unet.get_args_parser())"""


def finish(cells, folder, straight):
    """The same command with --resume auto ends in the straight run's bits."""
    train(cells, folder, "--epochs", 2, "--resume", "auto")
    assert_same(torch.load(folder / "last.pth", weights_only=True), straight)


def test_a_disk_that_is_full_at_any_save_costs_nothing_that_was_saved(cells, tmp_path, straight, monkeypatch):
    """The second epoch's files, one after the other, are written to /dev/full; then there is room."""
    real = builtins.open
    for name, time in (("args.json", 1), ("split.json", 1), ("log.csv.tmp", 2), ("best.pth", 1), ("last.pth", 2),
                       ("model.pth", 1), ("curves.png", 2), ("val_samples.png", 1)):
        written = []

        def opened(path, mode="r", *args, **more):
            if "w" in mode and os.path.basename(str(path)).startswith(name):
                written.append(path)
                path = "/dev/full" if len(written) == time else path
            return real(path, mode, *args, **more)
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", opened)
            patch.setattr(io, "open", opened)
            with pytest.raises((OSError, utils.InputError), match="No space left on device"):
                train(cells, tmp_path / name, "--epochs", 2)
        finish(cells, tmp_path / name, straight)


def test_a_folder_that_vanishes_is_named(cells, tmp_path, monkeypatch):
    real = train_unet.evaluate
    for gone in (tmp_path / "run", cells):
        monkeypatch.setattr(train_unet, "evaluate", lambda *args: [real(*args), shutil.rmtree(gone)][0])
        with pytest.raises((OSError, utils.InputError), match=str(gone)):
            train(cells, tmp_path / "run", "--epochs", 2)


def test_a_read_only_folder_is_named(cells, tmp_path):
    (tmp_path / "run").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path / "run"], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        with pytest.raises(OSError, match=f"Read-only file system: '{tmp_path}/run"):
            train(cells, tmp_path / "run")
    finally:
        subprocess.run(["umount", tmp_path / "run"], check=True)


def test_a_loader_process_killed_by_its_pid_is_one_line_and_resuming_gives_the_straight_runs_bits(
        cells, tmp_path, straight, script):
    code = """
import multiprocessing
real = utils.Run.save_last
def save_last(run):
    real(run)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
utils.Run.save_last = save_last"""
    done = script("-c", child(cells, tmp_path / "run", code, "-j", "1", "--save-every", "1"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "error: a loader process was killed; --resume auto" in done.stderr
    finish(cells, tmp_path / "run", straight)


def test_the_signal_of_a_killed_loader_may_come_after_its_lost_batch(cells, tmp_path, script):
    code = """
def main(args):
    def handler(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
    signal.signal(signal.SIGCHLD, handler)
    raise ConnectionResetError
def leave(prog):
    os.kill(os.getpid(), signal.SIGCHLD)
    real(prog)
real, utils.leave_without_loader, train_unet.main = utils.leave_without_loader, leave, main"""
    done = script("-c", child(cells, tmp_path / "run", code))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "a loader process was killed" in done.stderr


def test_ctrl_c_during_a_save_finishes_it_and_twice_leaves_the_earlier_file(
        cells, tmp_path, straight, script, monkeypatch):
    real, saves = os.replace, []

    def replace(source, target):
        saves.append(target)
        if len(saves) == 2:
            utils.remember_signal(signal.SIGINT, None)
        real(source, target)
    with monkeypatch.context() as patch, pytest.raises(utils.Stopped):
        patch.setattr(utils, "_signals", [])
        patch.setattr(os, "replace", replace)
        train(cells, tmp_path / "once", "--epochs", 2, "--save-every", 1)
    code = """
real, saves = os.replace, []
def replace(source, target):
    saves.append(target)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    real(source, target)
os.replace = replace"""
    assert script("-c", child(cells, tmp_path / "twice", code, "--save-every", "1")).returncode == -signal.SIGINT
    for name, step in (("once", 0), ("twice", 1)):  # an epoch has two steps
        found = torch.load(tmp_path / name / "last.pth", weights_only=True)
        assert (found["epoch"], found["step"]) == (0, step or 2)
        finish(cells, tmp_path / name, straight)
