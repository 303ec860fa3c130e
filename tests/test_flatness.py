"""Memory and open files stay flat: 500 steps and 20 epochs of each script, 2,000 frames of predict_video.py."""
import gc
import multiprocessing
import os
from importlib import import_module
from pathlib import Path

import pytest

import demo_data
import predict_video
import utils
from test_annotate import save_net
from test_resume import SMALL

FEW = ["--multiplier", "1", "--num-frames", "2", "--num-correction-points", "1"]  # of SAM 2, whose steps are slow


def usage():
    """Open files and resident megabytes of this process and its loaders."""
    gc.collect()
    pids = [os.getpid(), *[child.pid for child in multiprocessing.active_children()]]
    words = [Path(f"/proc/{pid}/status").read_text().split() for pid in pids]
    memory = sum(int(found[found.index("VmRSS:") + 1]) for found in words) / 2**10
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids), memory


def assert_flat(name, found):
    """found: usage after each epoch or 100 frames; the first quarter may fill caches."""
    found = found[len(found) // 4:]
    files, memory = zip(*found)
    print(f"{name}: {files[0]} to {files[-1]} open files, {memory[0]:.0f} to {memory[-1]:.0f} MB")
    assert max(files) <= files[0] and min(memory[-3:]) < 1.03 * memory[0], found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SMALL, "train_efficientsam_ddp"])
def test_500_steps_in_20_epochs(name, tmp_path, monkeypatch):
    kind, _, options = SMALL.get(name, SMALL["train_efficientsam"])
    size = 2 if name == "train_deeplabv3" else 1
    data, found, end_epoch = demo_data.write(kind, tmp_path / "data", 32 * size), [], utils.Run.end_epoch

    def measure(run, *args, **more):
        end_epoch(run, *args, **more)
        found.append(usage())
    monkeypatch.setattr(utils.Run, "end_epoch", measure)
    script = import_module(name)
    words = ["--data-path", data, "--output-dir", tmp_path / "run", "--device", "cpu", "-j", 1, "-b", size, "--epochs",
             20, *options.split(), *(FEW if name == "train_sam2" else [])]
    script.main(script.get_args_parser().parse_args([*map(str, words)]))
    assert len((tmp_path / "run/log.csv").read_text().splitlines()) == 21
    assert_flat(name, found)


@pytest.mark.slow
def test_2000_frames(tmp_path, monkeypatch):
    images, found, save_mask = demo_data.draw_clip(1, 64, 8)[0], [], utils.save_mask
    (tmp_path / "clip").mkdir()
    for t in range(2000):
        utils.save_image(tmp_path / f"clip/{t:05d}.png", images[t % 8])

    def measure(path, mask):
        save_mask(path, mask)
        if int(Path(path).stem) % 100 == 0:
            found.append(usage())
    monkeypatch.setattr(utils, "save_mask", measure)
    words = ["--weights", save_net(tmp_path / "net.pth", "sam2", 0), tmp_path / "clip", "--box", "10,8,40,36",
             "--device", "cpu", "--output-dir", tmp_path / "out"]
    predict_video.main(predict_video.get_args_parser().parse_args([*map(str, words)]))
    assert len(found) == 20
    assert_flat("predict_video", found)
