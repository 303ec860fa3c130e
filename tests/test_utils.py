"""utils.py: checkpoints that cannot break or bite, images of every kind, seeds, options, weights, process groups."""
import contextlib
import gc
import hashlib
import importlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import train_unet
import utils
from nets import weights
from conftest import ROOT, save_grey

STATE = {"format": 1, "model": {"weight": torch.arange(12.0).reshape(3, 4), "n": torch.tensor(3)}, "args": {"lr": 0.1}}


# --- Checkpoints ---

def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    utils.save_checkpoint(tmp_path / "a.pth", STATE)
    for loaded in (utils.load_checkpoint(tmp_path / "a.pth"), torch.load(tmp_path / "a.pth", weights_only=True)):
        assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"]) and loaded["args"] == {"lr": 0.1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_no_flipped_bit_changes_a_value_in_silence(tmp_path):
    utils.save_checkpoint(tmp_path / "a.pth", STATE)
    whole = (tmp_path / "a.pth").read_bytes()
    rng = np.random.default_rng(0)
    places = [(int(rng.integers(len(whole))), int(rng.integers(8))) for _ in range(300)]
    places += [(byte, bit) for byte in range(len(whole) - 40, len(whole)) for bit in range(8)]
    harmless = 0
    for byte, bit in places:
        spoilt = bytearray(whole)
        spoilt[byte] ^= 1 << bit
        (tmp_path / "b.pth").write_bytes(spoilt)
        try:
            loaded = utils.load_checkpoint(tmp_path / "b.pth")
        except utils.InputError as error:
            assert str(error).startswith(f"{tmp_path}/b.pth: ")
        else:  # a bit that says nothing of the values: a date, say
            harmless += 1
            assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
            assert loaded["model"]["n"] == 3 and loaded["args"] == {"lr": 0.1} and loaded["format"] == 1
    assert harmless < len(places) / 2
    (tmp_path / "b.pth").write_bytes(whole[:-1000])
    with pytest.raises(utils.InputError, match="damaged"):
        utils.load_checkpoint(tmp_path / "b.pth")


def test_a_zip_is_checked_by_its_crcs(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "a.pth")
    assert utils.load_checkpoint(tmp_path / "a.pth")["weight"].shape == (1000,)
    spoilt = bytearray((tmp_path / "a.pth").read_bytes())
    middle = spoilt.index(bytes(400)) + 200  # amid the zeros of the tensor
    spoilt[middle] ^= 1
    (tmp_path / "a.pth").write_bytes(spoilt)
    with pytest.raises(utils.InputError, match="damaged"):
        utils.load_checkpoint(tmp_path / "a.pth")


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)),
                                  lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False)])
def test_a_malicious_pickle_never_runs(tmp_path, save):
    save({"model": Bomb(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(utils.InputError, match="a.pth: (holds Python objects|not a checkpoint)"):
        utils.load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_former_file_and_says_how_much_is_missing(tmp_path):
    utils.save_checkpoint(tmp_path / "a.pth", STATE)
    before = (tmp_path / "a.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # no file may grow beyond 1 MB
    try:
        with pytest.raises(utils.InputError, match=r"a.pth: cannot be written .*: 8.0 MB needed, [\d.]+ MB free; the"):
            utils.save_checkpoint(tmp_path / "a.pth", {"weight": torch.zeros(2**21)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.pth").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_truly_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        utils.save_checkpoint(disk / "a.pth", STATE)
        with pytest.raises(utils.InputError, match=r"8.0 MB needed, [12].\d MB free; the previous file is intact"):
            utils.save_checkpoint(disk / "a.pth", {"weight": torch.zeros(2**21)})
        assert utils.load_checkpoint(disk / "a.pth")["format"] == 1 and len(list(disk.iterdir())) == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_weights_load_from_every_wrapping(tmp_path):
    source, target = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    for state in (source.state_dict(), {"model": source.state_dict()},
                  {f"module.{key}": value for key, value in source.state_dict().items()}):
        torch.save(state, tmp_path / "a.pth")
        torch.nn.init.zeros_(target.weight)
        weights.load_weights(target, weights.read_weights(tmp_path / "a.pth", {"net": "linear"}), tmp_path / "a.pth")
        assert torch.equal(source.weight, target.weight)
    whole = source.state_dict()
    for state in ({"weight": source.weight}, {**whole, "extra": source.bias}, [1], {"weight": 3, "bias": 4}):
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(utils.InputError, match="a.pth: weights of another net"):
            state = weights.read_weights(tmp_path / "a.pth", {"net": "linear"})
            weights.load_weights(target, state, tmp_path / "a.pth")


# --- Weights from the network (served from a file, the only thing ever mocked) ---

def test_weights_are_fetched_once_verified_always_and_offline_says_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = tmp_path / "official.pth"
    source.write_bytes(b"weights" * 1000)
    digest, size = hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_size
    path = weights.fetch_weights("net", source.as_uri(), digest[:8], size)
    assert path == tmp_path / "hub/checkpoints/official.pth" and path.read_bytes() == source.read_bytes()
    source.unlink()
    assert weights.fetch_weights("net", source.as_uri(), digest, size) == path  # from the cache
    assert weights.fetch_weights("net", source.as_uri(), None, size) == path
    path.write_bytes(b"weightz" + path.read_bytes()[7:])
    with pytest.raises(utils.InputError, match="official.pth: not the published net.*delete it"):
        weights.fetch_weights("net", source.as_uri(), digest, size)
    path.unlink()
    with pytest.raises(utils.InputError) as caught:
        weights.fetch_weights("net", source.as_uri(), digest, size)
    assert source.as_uri() in str(caught.value) and str(path) in str(caught.value)
    assert str(caught.value).startswith("official weights net: ")  # the option may be --teacher
    assert not list(path.parent.iterdir())


# --- Images ---

def test_every_mode_becomes_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    grey = Image.fromarray(rgb).convert("L")
    images = {"rgb.png": Image.fromarray(rgb), "rgba.png": Image.fromarray(np.dstack([rgb, rgb[..., :1]])),
                "l.png": grey, "la.png": grey.convert("LA"), "1.png": grey.convert("1"),
                "p.png": Image.fromarray(rgb).quantize(8),
                "cmyk.tif": Image.fromarray(rgb).convert("CMYK"), "p.gif": Image.fromarray(rgb).quantize(8)}
    for name, image in images.items():
        image.save(tmp_path / name)
        pixels = utils.read_image(tmp_path / name)
        assert pixels.shape == (5, 7, 3) and pixels.dtype == np.uint8, name
        if name in ("rgb.png", "rgba.png"):
            assert np.array_equal(pixels, rgb), name
        if name == "l.png":
            assert np.array_equal(pixels, np.dstack([np.asarray(grey)] * 3))
        assert utils.image_size(tmp_path / name) == (7, 5)


def test_sixteen_bits_are_scaled_by_their_own_range(tmp_path):
    deep = np.array([[1000, 1500], [2000, 3000]], np.uint16)
    expected = [[0, 64], [128, 255]]
    for name in ("a.png", "a.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert utils.read_image(tmp_path / name)[..., 1].tolist() == expected, name
    Image.fromarray(deep.astype(np.float32) / 7).save(tmp_path / "f.tif")
    assert utils.read_image(tmp_path / "f.tif")[..., 1].tolist() == expected
    colour = np.dstack([deep, deep // 2, deep * 0 + 1000])  # RGB; OpenCV writes BGR
    cv2.imwrite(str(tmp_path / "c.png"), colour[..., ::-1])
    pixels = utils.read_image(tmp_path / "c.png").astype(int)
    assert np.abs(pixels - (colour - 500.0) / 2500 * 255).max() <= 0.5
    Image.fromarray(np.full((2, 2), 77, np.uint16)).save(tmp_path / "flat.png")
    assert not utils.read_image(tmp_path / "flat.png").any()


def test_exif_rotation_is_applied_to_pixels_and_size(tmp_path):
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert utils.read_image(tmp_path / "a.jpg").shape == (6, 4, 3) and utils.image_size(tmp_path / "a.jpg") == (4, 6)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp"])
def test_truncated_images_are_refused_never_half_grey(tmp_path, name):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for part in (0.95, 0.5, 0.1, 0):
        (tmp_path / name).write_bytes(whole[:int(len(whole) * part)])
        with pytest.raises(utils.InputError, match=f"{name}: (truncated|not an image)"):
            utils.read_image(tmp_path / name)


def test_a_png_whose_checksum_differs_is_refused(tmp_path):
    """PIL fills what cannot be decompressed with 0 if there is enough of it; a last byte more may say nothing."""
    for place in (-60, -20):
        Image.fromarray(np.random.default_rng(0).integers(0, 99, (40, 56), np.uint8)).save(tmp_path / "a.png")
        data = bytearray((tmp_path / "a.png").read_bytes())
        assert utils.read_mask(tmp_path / "a.png").shape == (40, 56)
        data[place:place + 4] = bytes(4)
        (tmp_path / "a.png").write_bytes(data)
        for read in (utils.read_image, utils.read_mask):
            with pytest.raises(utils.InputError, match="a.png: truncated or unreadable"):
                read(tmp_path / "a.png")


def test_an_array_whose_head_is_damaged_or_claims_too_much_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 6), np.uint8))
    whole = (tmp_path / "a.npy").read_bytes()
    for damaged in (whole.replace(b"}", b"{"), whole.replace(b"(5, 6)", b"((((("), whole.replace(b"5, 6", b"9e9,"),
                    whole.replace(b"(5, 6), }          ", b"(99999, 99999999), }")):
        assert damaged != whole
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(utils.InputError, match=r"^[^\n]*a.npy: not an array of numbers[^\n]*$"):
            utils.read_array(tmp_path / "a.npy")


def test_a_stack_of_images_is_refused(tmp_path):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (1, 2, 3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(utils.InputError, match="a.tif: holds 3 images"):
        utils.read_image(tmp_path / "a.tif")


def test_masks_keep_their_ids(tmp_path):
    ids = np.array([[0, 1], [200, 255]], np.uint8)
    utils.save_mask(tmp_path / "p.png", ids)
    assert Image.open(tmp_path / "p.png").mode == "P" and np.array_equal(utils.read_mask(tmp_path / "p.png"), ids)
    save_grey(tmp_path / "deep.png", ids.astype(np.uint16) * 200)
    assert np.array_equal(utils.read_mask(tmp_path / "deep.png"), ids.astype(int) * 200)
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (4, 4, 3), np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(utils.InputError, match="c.png: colour-coded"):
        utils.read_mask(tmp_path / "c.png")


def test_the_palette_is_pascal_vocs():
    assert utils.palette()[[0, 1, 2, 8, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [64, 0, 0], [192, 128, 128], [224, 224, 192]]


def test_an_overlay_tints_objects_and_leaves_background_and_void():
    image, mask = np.full((9, 9, 3), 100, np.uint8), np.zeros((9, 9), np.uint8)
    mask[:4], mask[7:] = 1, 255
    out = utils.overlay(image, mask)
    assert (out[4:] == 100).all() and (out[:4, :, 0] > 100).all()


def test_the_tints_of_the_first_classes_differ_more_than_the_palette_s():
    def least(colours):
        shown = (0.4 * colours[1:21] / 255).astype(np.float32)  # on black, as overlay tints
        lab = cv2.cvtColor(shown[None], cv2.COLOR_RGB2LAB)[0]
        distances = np.linalg.norm(lab[:, None] - lab, axis=2)
        return distances[distances > 0].min()

    assert least(utils.tints()) > 1.5 * least(utils.palette() * 0.75 + 64)


def test_a_panel_has_titles_once_whole_names_and_a_legend(tmp_path):
    images = [np.zeros((9, 9, 3), np.uint8)] * 3
    legend = utils.class_tints(["ground", "road", "car"])
    assert [*legend] == ["1 road", "2 car"]
    assert [*utils.class_tints(["cat", "dog"], 1)] == ["1 cat", "2 dog"] and not utils.class_tints(["cell"], 1)
    assert "300 c" in utils.class_tints(["c"] * 400) and "255 c" not in utils.class_tints(["c"] * 400)  # as drawn
    for text in legend:  # the legend's colours are the overlay's
        outlined = utils.overlay(np.zeros((5, 5, 3), np.uint8), np.eye(5, dtype=int) * int(text[0]))
        assert (outlined == legend[text]).all(2).any()
    utils.save_panel(tmp_path / "panel.png", {"n" * 60: images, "b": images}, ["image", "", ""], legend)
    panel = np.array(Image.open(tmp_path / "panel.png"))
    assert panel.shape == (20 + 2 * 280 + 20, 780, 3)
    dark = panel.max(2) < 128
    assert dark[:20, :260].any() and not dark[:20, 260:].any()  # titles
    assert dark[20:40, 260:520].any() and not dark[300:320, 260:].any()  # a long name, a short one
    for colour in legend.values():
        assert (panel[-20:] == colour).all(2).sum() == 12 * 12
    long = {"w" * 40 + str(k): (1, 2, 3) for k in range(5)}
    utils.save_panel(tmp_path / "panel.png", {"b": images}, ["", "", ""], long)
    assert len(np.array(Image.open(tmp_path / "panel.png"))) > 20 + 280 + 20  # on several lines


def test_chinese_names_are_drawn_by_a_chinese_font_or_a_note_says_that_there_is_none(tmp_path, capsys, monkeypatch):
    import matplotlib
    font = os.path.join(matplotlib.get_data_path(), "fonts/ttf/DejaVuSerif.ttf")
    for fonts, note in (([], "no Chinese font"), (["no-such-font", font], "")):
        utils.load_font.cache_clear()
        monkeypatch.setattr(utils, "CHINESE_FONTS", fonts)
        for _ in range(2):
            utils.save_panel(tmp_path / "panel.png", {"\u7ec6\u80de": [np.zeros((9, 9, 3), np.uint8)]}, ["x"])
        printed = capsys.readouterr().out
        assert note in printed and printed.count("note") == bool(note)
        assert utils.load_font(True).getname()[0] == ("DejaVu Serif" if fonts else "DejaVu Sans")
    assert utils.load_font(False).getname()[0] == "DejaVu Sans"
    utils.load_font.cache_clear()


def test_curves_have_a_title_and_lines_of_equal_values_all_show(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    run, figures = utils.Run(run_options(tmp_path, model="tiny"), "sam2"), []
    run.progress, run.rows = {"best_epoch": 2}, [{"epoch": k, "a": 0.5, "b": 0.5} for k in (1, 2, 3)]
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    run.plot_curves(["a", "b"])
    assert figures[0].get_suptitle() == "sam2, tiny: best in epoch 2"
    assert len({line.get_linestyle() for line in figures[0].axes[0].lines}) == 2


def test_the_end_says_that_no_epoch_beat_the_start(tmp_path, capsys):
    run = utils.Run(run_options(tmp_path, demo=False), "sam2")
    for saved, epoch, said in ((False, 0, False), (True, 0, True), (True, 3, False)):
        if saved:
            (tmp_path / "best.pth").touch()
        run.progress = {"best": 0.25, "best_epoch": epoch}
        run.finish("val_iou")
        assert ("no epoch beat the start" in capsys.readouterr().out) == said


# --- Options, seeds, sampler, log ---

def test_switches_take_words_and_numbers():
    for text, value in (("True", True), ("yes", True), ("1", True), ("False", False), ("no", False), ("0", False)):
        assert utils.switch(text) is value
    with pytest.raises(Exception, match="neither"):
        utils.switch("maybe")
    assert [utils.amp_mode(text) for text in ("True", "False", "bf16", "off")] == ["auto", "off", "bf16", "off"]


def test_dashes_and_underscores_are_one_and_values_are_left_alone():
    parser = utils.ArgumentParser("x", demo={"batch_size": 9})
    parser.add_run_options("out")
    parser.add_argument("--batch-size", "-b", type=int, default=1)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--name")
    for words in (["--batch-size", "4"], ["--batch_size", "4"], ["-batch_size", "4"], ["-batch-size=4"], ["-b", "4"],
                  ["-b4"], ["--batch_size=4"]):
        assert parser.parse_args(words).batch_size == 4, words
    args = parser.parse_args(["-lr", "1e-3", "-num_workers", "0", "--name", "a_b=c_d", "--sanity_check", "False"])
    assert (args.lr, args.workers, args.name, args.sanity_check) == (1e-3, 0, "a_b=c_d", False)
    with pytest.raises(SystemExit):
        parser.parse_args(["--name", "x", "--batch", "4"])  # no abbreviations
    assert parser.parse_args(["--demo"]).batch_size == 9 and parser.parse_args(["--demo", "-b", "2"]).batch_size == 2


def test_the_order_depends_on_seed_and_epoch_and_ranks_share_it_out():
    def order(epoch, skip=0, seed=1, rank=0, world_size=1):
        sampler = utils.EpochSampler(10, seed, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch, skip)
        assert len(sampler) == len(list(sampler))
        return list(sampler)
    assert order(0) == order(0) and order(0, seed=2) != order(0)
    assert [index for _, index in order(0)] != [index for _, index in order(1)]
    assert sorted(index for _, index in order(3)) == list(range(10)) and {epoch for epoch, _ in order(3)} == {3}
    assert order(2, skip=4) == order(2)[4:] and order(2, skip=12) == []
    assert sorted(sum((order(1, rank=rank, world_size=3) for rank in range(3)), [])) == sorted(order(1))


def test_seeded_blocks_do_not_touch_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with utils.seeded(1, 2, 3):
        a = torch.rand(4)
    assert torch.equal(torch.rand(2), expected)
    with utils.seeded(1, 2, 3):
        assert torch.equal(torch.rand(4), a)
    with utils.seeded(1, 2, 4):
        assert not torch.equal(torch.rand(4), a)


def test_log_rows_of_a_repeated_epoch_replace_the_old_ones(tmp_path):
    for epoch, loss in ((1, 0.5), (2, 0.4), (3, 0.3), (2, 0.25)):
        rows = utils.log_row(tmp_path / "log.csv", {"epoch": epoch, "loss": loss})
    assert [(row["epoch"], row["loss"]) for row in rows] == [("1", "0.5"), ("2", "0.25")]
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n1,0.5\n2,0.25\n"


def test_devices():
    assert utils.pick_device("cpu").type == "cpu"
    assert utils.pick_precision("bf16", torch.device("cpu"))[0] is torch.bfloat16
    assert utils.pick_precision("auto", torch.device("cpu"))[0] is None


@pytest.mark.parametrize("status, expected", [("ALLOC_FAILED", True), ("EXECUTION_FAILED", False)])
def test_cublas_without_memory_is_out_of_memory(status, expected):
    error = RuntimeError(f"CUDA error: CUBLAS_STATUS_{status} when calling `cublasCreate(handle)`")
    assert utils.is_out_of_memory(error) == expected


def test_out_of_memory_is_one_line(script):
    done = script("-c", "import sys, torch, utils\nsys.argv = ['x.py']\n"
                  "def main(args): raise torch.OutOfMemoryError('CUDA out of memory. Tried')\n"
                  "utils.run(main, utils.ArgumentParser('x'))")
    assert done.returncode == 2 and done.stderr.startswith("x.py: error: out of memory: try a smaller --batch-size")
    assert done.stderr.count("\n") == 1


def test_lack_of_memory_on_a_cpu_is_one_line_too(script):
    done = script("-c", "import sys, torch, utils\nsys.argv = ['x.py']\n"
                  "def main(args): torch.empty(2**60)\nutils.run(main, utils.ArgumentParser('x'))")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("x.py: error: out of memory")


def test_names_in_any_bytes_can_be_hashed_and_drawn(tmp_path):
    path = tmp_path / os.fsdecode(b"q\xff.png")
    save_grey(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "a.png").rename(path)
    assert utils.data_hash([(path.stem, path, [path])]) != utils.data_hash([])
    utils.save_panel(tmp_path / "panel.png", {path.stem: [np.zeros((9, 9, 3), np.uint8)], "\u7ec6": [
        np.zeros((9, 9, 3), np.uint8)]}, ["x"])
    assert Image.open(tmp_path / "panel.png").size == (260, 20 + 2 * 280)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, script):
    (tmp_path / "file").touch()
    done = script("predict.py", "--weights", tmp_path / "file/x.pth", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "x.pth" in done.stderr
    done = script("-c", "import sys, utils\nsys.argv = ['x.py']\n"
                  f"def main(args): utils.Path({str(tmp_path / 'file/out')!r}).mkdir()\n"
                  "utils.run(main, utils.ArgumentParser('x'))")
    assert done.returncode == 2 and done.stderr.startswith(f"x.py: error: {tmp_path}/file/out: Not a directory")


def test_our_own_bugs_keep_their_traceback(script):
    done = script("-c", "import sys, utils\nsys.argv = ['x.py']\ndef main(args): 1 / 0\n"
                  "utils.run(main, utils.ArgumentParser('x'))")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def test_a_process_that_another_ones_signal_stops_says_so(script):
    done = script("-c", "import sys, utils\nsys.argv = ['x.py']\ndef main(args): raise utils.Stopped\n"
                  "utils.run(main, utils.ArgumentParser('x'))")
    assert (done.returncode, done.stderr) == (143, "x.py: stopped by SIGTERM\n")


def test_a_second_signal_ends_a_process_at_once_but_not_under_torchrun_which_sends_one_too(script, monkeypatch):
    code = ("import os, sys, utils\nsys.argv = ['x.py']\ndef main(args):\n    os.kill(os.getpid(), 15)\n"
            "    os.kill(os.getpid(), 15)\n    utils.raise_if_stopped()\nutils.run(main, utils.ArgumentParser('x'))")
    assert script("-c", code).returncode == -15
    monkeypatch.setenv("RANK", "1")
    assert script("-c", code).returncode == 143


def test_two_processes_join_and_sum(tmp_path):
    (tmp_path / "sums.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                      "import torch, utils\n"
                                      "utils.start_process_group(torch.device('cpu'))\n"
                                      "rank, world = utils.ranks()\n"
                                      "total = utils.sum_over_ranks(torch.tensor([rank + 1.0])).item()\n"
                                      "print('silent but on the first')\n"
                                          "sys.stderr.write(f'{rank} {world} {total}\\n')\n"
                                      "torch.distributed.destroy_process_group()\n")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "sums.py"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.count("silent but on the first\n") == 1  # torch 2.10's Gloo prints there too
    assert "0 2 3.0\n" in done.stderr and "1 2 3.0\n" in done.stderr
    assert utils.start_process_group(torch.device("cpu")) == torch.device("cpu") and utils.ranks() == (0, 1)
    assert utils.sum_over_ranks(torch.tensor([5.0])).item() == 5.0


def test_seeded_runs_on_one_thread_and_puts_generator_and_threads_back():
    torch.set_num_threads(2)
    try:
        torch.manual_seed(3)
        with utils.seeded(1, 2, 3):
            assert torch.get_num_threads() == 1
            first = torch.rand(2)
        with pytest.raises(KeyError), utils.seeded(1, 2, 3):
            assert torch.equal(torch.rand(2), first)
            raise KeyError
        after = torch.rand(2)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(2), after) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_kept_part_of_the_order_is_shared_evenly_by_the_ranks():
    samplers = [utils.EpochSampler(11, 5, rank=rank, world_size=3, keep=9) for rank in range(3)]
    whole = utils.EpochSampler(11, 5)
    for epoch in (0, 1):
        for sampler in (*samplers, whole):
            sampler.set_epoch(epoch)
        parts = [[index for _, index in sampler] for sampler in samplers]
        assert [len(part) for part in parts] == [3, 3, 3]
        assert [index for step in zip(*parts) for index in step] == [index for _, index in whole][:9]


def test_an_obsolete_option_says_what_to_use_instead(capsys):
    parser = utils.ArgumentParser("x")
    parser.add_argument("--print-freq", action=utils.Obsolete, help="no effect: look at the bar")
    assert vars(parser.parse_args(["--print-freq", "10"])) == {"print_freq": None}
    assert capsys.readouterr().out == "note: --print-freq: no effect: look at the bar\n"


# --- Data that is checked before the start ---

@pytest.mark.parametrize("workers", [0, 2])
def test_all_items_are_checked_in_order_and_only_the_first_ones_whole(monkeypatch, workers):
    monkeypatch.setattr(utils, "READ_WHOLE", 3)
    args = SimpleNamespace(sanity_check=False, workers=workers)
    items = list(range(1200))
    found = utils.check_items(has_object, items, args)
    assert found == [item == 1 or item > 2 for item in items]
    args.sanity_check = True
    assert utils.check_items(has_object, items, args) == [item == 1 for item in items]
    with pytest.raises(utils.InputError, match="item 1100 is bad") as caught:
        utils.check_items(refuse_one, items, args)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # else ten seconds for what
    del caught  # the exception holds
    gc.collect()


def has_object(item, whole):
    return item == 1 if whole else True


def refuse_one(item, whole):
    if item == 1100:
        raise utils.InputError(f"item {item} is bad")
    return True


def test_the_size_of_a_large_png_is_read_without_its_pixels(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((30, 40), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", None)
    assert utils.image_size(tmp_path / "a.png") == (40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_size_and_pixels_agree_for_every_exif_rotation(tmp_path, name, orientation):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    read = utils.read_image(tmp_path / name)
    assert utils.image_size(tmp_path / name) == read.shape[1::-1] == ((16, 32) if orientation > 4 else (32, 16))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert read[corner[orientation]].min() > 240 and (read > 128).all(2).mean() == 0.25


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_deep_files_that_readers_turn_in_their_own_ways_are_refused(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((4, 6), 3000, np.uint16)).save(tmp_path / name, exif=exif)
    for read in (utils.read_image, utils.read_mask):
        with pytest.raises(utils.InputError, match=f"{name}: 16-bit file with EXIF rotation"):
            read(tmp_path / name)


def test_separate_planes_of_sixteen_bits_are_refused(tmp_path):
    """Bytes by hand: a little-endian TIFF of 2x1 pixels, three planes of two bytes each."""
    tags = [(256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 150), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 3, 156),
            (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 3, 168), (284, 3, 1, 2)]
    data = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = (data + bytes(4)).ljust(150, b"\0") + struct.pack("<3H", 16, 16, 16)
    data += struct.pack("<3I", 180, 184, 188) + struct.pack("<3I", 4, 4, 4) + bytes(range(12))
    (tmp_path / "planes.tif").write_bytes(data)
    with pytest.raises(utils.InputError, match="planes.tif: 16-bit file with separate colour planes"):
        utils.read_image(tmp_path / "planes.tif")


def test_deep_masks_keep_their_ids(tmp_path):
    ids = np.array([[0, 2], [300, 2]], np.uint16)
    cv2.imwrite(str(tmp_path / "grey.png"), ids)
    cv2.imwrite(str(tmp_path / "colour.png"), np.stack([ids] * 3, 2))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([ids, ids, ids, np.full_like(ids, 65535)]))
    for name in ("grey.png", "colour.png", "alpha.png"):
        assert np.array_equal(utils.read_mask(tmp_path / name), ids), name
    cv2.imwrite(str(tmp_path / "colours.png"), np.stack([ids, ids, 0 * ids], 2))
    with pytest.raises(utils.InputError, match="colour-coded"):
        utils.read_mask(tmp_path / "colours.png")


def test_a_decoder_that_returns_nothing_is_a_bad_file(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint16))
    monkeypatch.setattr(cv2, "imdecode", lambda *args: None)
    with pytest.raises(utils.InputError, match="a.png: cannot be read"):
        utils.read_image(tmp_path / "a.png")


@pytest.mark.parametrize("high, mean", [(1.0, 127), (1.0000002, 127), (1.13, 120), (255.0, 127), (255.3, 127)])
def test_floats_a_little_beyond_their_range_are_cut_off(tmp_path, high, mean):
    np.save(tmp_path / "a.npy", np.linspace(0, high, 10_000).reshape(100, 100))
    read = utils.read_image(tmp_path / "a.npy")
    assert read.max() == 255 and read.mean() > mean
    np.save(tmp_path / "a.npy", np.linspace(-0.3, high, 10_000).reshape(100, 100))
    assert utils.read_image(tmp_path / "a.npy").min() == 0


@pytest.mark.parametrize("low, high", [(0, 1.6), (0, 7.0), (0, 15), (0, 300.0), (-0.6, 1)])
def test_floats_of_an_unknown_range_are_refused(tmp_path, low, high):
    np.save(tmp_path / "a.npy", np.linspace(low, high, 100).reshape(10, 10))
    with pytest.raises(utils.InputError, match="a.npy: floats from .* to .*; give 0..1 or 0..255"):
        utils.read_image(tmp_path / "a.npy")


def png_of_few_bits(path, bits, values):
    """A grey PNG of one row with several values in a byte."""
    row = b"\0" + np.packbits(np.unpackbits(np.array(values, np.uint8)[:, None], axis=1)[:, -bits:]).tobytes()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)), (b"IDAT", zlib.compress(row)),
             (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_files_whose_values_are_not_the_ids_that_were_saved_are_refused(tmp_path):
    ids = np.array([[0, 3, 15, 255]], np.uint8)
    Image.fromarray(ids).save(tmp_path / "a.gif")  # the palette has these greys alone
    Image.fromarray(ids.repeat(16, 0).repeat(16, 1)).save(tmp_path / "a.tif", compression="jpeg")
    (tmp_path / "a.pgm").write_bytes(b"P5\n4 1\n7\n" + bytes([0, 1, 3, 7]))
    png_of_few_bits(tmp_path / "four.png", 4, [0, 1, 3, 15])
    png_of_few_bits(tmp_path / "two.png", 2, [0, 1, 2, 3])
    (tmp_path / "b.pgm").write_bytes(b"P5\n4 1\n300\n" + np.array([0, 1, 3, 300], ">u2").tobytes())
    image = Image.fromarray(ids)
    image.save(tmp_path / "white.tif", tiffinfo={262: 0})  # 0 is white
    image = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 3]))
    image.putpalette([0, 0, 0, 3, 3, 3, 15, 15, 15, 255, 255, 255])
    image.save(tmp_path / "grey.png")
    for name, words in (("a.gif", "GIF can renumber"), ("grey.png", "palette has greys other than its indices"),
                        ("a.tif", "compression can change"), ("a.pgm", "scaled"), ("b.pgm", "scaled"),
                        ("four.png", "scaled"), ("two.png", "scaled"), ("white.tif", "inverted")):
        with pytest.raises(utils.InputError, match=f"{name}: .*{words}.*; save the ids as a grey PNG"):
            utils.read_mask(tmp_path / name)
    png_of_few_bits(tmp_path / "one.png", 1, [0, 1, 1, 0])
    assert utils.read_mask(tmp_path / "one.png").tolist() == [[False, True, True, False]]
    (tmp_path / "b.pgm").write_bytes(b"P5\n4 1\n255\n" + bytes([0, 1, 3, 7]))
    assert utils.read_mask(tmp_path / "b.pgm").tolist() == [[0, 1, 3, 7]]
    Image.fromarray(ids).save(tmp_path / "c.tif", compression="tiff_lzw")
    assert np.array_equal(utils.read_mask(tmp_path / "c.tif"), ids)
    for palette in ([0, 0, 0, 255, 255, 255], [0, 0, 0, 128, 128, 128, 200, 10, 10], [k // 3 for k in range(768)]):
        image = Image.frombytes("P", (3, 1), bytes([0, 1, 1]))
        image.putpalette(palette)
        image.save(tmp_path / "p.png")  # black and white; VOC has a grey among its colours; greys that are indices
        assert utils.read_mask(tmp_path / "p.png").tolist() == [[0, 1, 1]]


def test_an_opaque_alpha_channel_has_no_part_in_the_range_of_a_deep_image(tmp_path):
    pixels = np.linspace(0, 4095, 48).reshape(4, 4, 3).round().astype(np.uint16)
    np.save(tmp_path / "a.npy", np.dstack([pixels, np.full((4, 4), 65535, np.uint16)]))
    cv2.imwrite(str(tmp_path / "a.png"), np.dstack([pixels[..., ::-1], np.full((4, 4), 65535, np.uint16)]))
    for name in ("a.npy", "a.png"):
        assert (utils.read_image(tmp_path / name).min(), utils.read_image(tmp_path / name).max()) == (0, 255)


# --- Options and folders that two would use ---

@pytest.mark.parametrize("words", [["--name", "x", "--output-dir", "y"], ["--dataset", "x", "--data_path", "y"]])
def test_two_names_of_one_setting_are_refused(capsys, words):
    with pytest.raises(SystemExit):
        train_unet.get_args_parser().parse_args(words)
    assert "two names of one setting; give one" in capsys.readouterr().err


def test_a_negative_first_number_is_a_value():
    import predict
    args = predict.get_args_parser().parse_args(["--weights", "w", "a.png", "--box", "-1,2,3,4"])
    assert args.box == [[-1, 2, 3, 4]]


def test_a_folder_in_use_is_refused_until_the_other_process_has_ended(tmp_path):
    code = f"import sys, time, utils; from pathlib import Path; lock = utils.lock_folder(Path({str(tmp_path)!r})); " \
        "print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(utils.InputError, match="another process is writing there"):
            utils.lock_folder(tmp_path)
    finally:
        other.kill()
        other.wait()
    utils.lock_folder(tmp_path)


def test_overwriting_removes_what_runs_write_and_nothing_of_the_user(tmp_path):
    mine = ["photo.png", "results_final.txt", "notes.log"]
    for name in [*mine, "last.pth", "best.pth", "val_samples.png", "results20260101-120000.txt"]:
        (tmp_path / name).write_text("x")
    args = SimpleNamespace(output_dir=str(tmp_path), resume=None, overwrite=True, demo=False)
    utils.prepare_folder(args, {})
    assert {path.name for path in tmp_path.iterdir()} == {*mine, "args.json", "split.json"}


def test_a_demo_never_replaces_a_run_that_is_none(tmp_path):
    for demo, refused in ((False, True), (True, False)):
        (tmp_path / "last.pth").write_text("x")
        (tmp_path / "args.json").write_text(json.dumps({"args": {"demo": demo}}))
        args = SimpleNamespace(output_dir=str(tmp_path), resume=None, overwrite=False, demo=True)
        with pytest.raises(utils.InputError, match="there is a run here") if refused else contextlib.nullcontext():
            utils.prepare_folder(args, {})


def test_weights_in_the_wrappings_of_other_tools_load(tmp_path):
    net = torch.nn.Linear(2, 3)
    for wrap in (lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3},
                 lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
                 lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
                 lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.5},
                 lambda state: {"net": state, "acc": 90.1}):
        torch.save(wrap(net.state_dict()), tmp_path / "a.pth")
        other = torch.nn.Linear(2, 3)
        weights.load_weights(other, weights.read_weights(tmp_path / "a.pth", {}), tmp_path / "a.pth")
        assert torch.equal(other.weight, net.weight)
    torch.save({"backbone.weight": net.weight}, tmp_path / "a.pth")
    with pytest.raises(utils.InputError, match="begins with backbone.weight, the net with weight"):
        weights.load_weights(other, weights.read_weights(tmp_path / "a.pth", {}), tmp_path / "a.pth")


def test_a_run_whose_model_is_no_dictionary_is_not_resumed(tmp_path):
    state = {"format": utils.FORMAT, "model": {}, "optimizer": {}, "args": {"weights": "none"}, "epoch": 2, "step": 5}
    for part in ("model", "args"):
        utils.save_checkpoint(tmp_path / "last.pth", {**state, part: [1]})
        with pytest.raises(utils.InputError, match="last.pth: not a whole checkpoint"):
            utils.Run(run_options(tmp_path, resume="auto"), "linear")


def test_a_list_is_read_back_as_it_was_written(tmp_path):
    """Names with spaces at their ends, a no-break space, line separators that are no newline, bytes beyond UTF-8."""
    names = ["a ", " b", "c d", "\u00a0e", "f\u2028g", "h\x85i", "\udcff", "j"]
    for newline in ("\n", "\r\n"):
        text = newline.join([names[0], "", "  ", *names[1:]]) + newline
        (tmp_path / "list.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert utils.read_lines(tmp_path / "list.txt") == names
    (tmp_path / "list.txt").write_bytes("\ufeffa\nb".encode("utf-16-le"))
    assert utils.read_lines(tmp_path / "list.txt") == ["a", "b"]
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(utils.InputError, match="list.txt: neither UTF-8 nor UTF-16 text; save it as UTF-8"):
        utils.read_lines(tmp_path / "list.txt")


@pytest.mark.parametrize("reason, words", [
    ("FileNotFoundError(2, 'No such file', 'x.png')", "x.png: No such file; look at it, or give another file"),
    ("OSError(28, 'No space left on device', 'x.png')", "x.png: No space left on device; free space, or give another")])
def test_an_error_of_the_system_names_the_remedy_that_fits(script, reason, words):
    done = script("-c", f"import sys, utils\nsys.argv = ['x.py']\ndef main(args): raise {reason}\n"
                  "utils.run(main, utils.ArgumentParser('x'))")
    assert done.returncode == 2 and done.stderr.startswith(f"x.py: error: {words}")


def test_overfitting_needs_no_split():
    args = SimpleNamespace(split=None, val_path=None, seed=41, limit=None, overfit=3, data_path="data")
    assert utils.split_items([("a", "a.png")], args) == ([("a", "a.png")],) * 2
    items = [(str(i), f"{i}.png") for i in range(10)]
    train, val = utils.split_items(items, args)
    assert train == val and len(train) == 3
    with pytest.raises(utils.InputError, match="0 training and 1 validation images"):
        utils.split_items(items[:1], SimpleNamespace(**{**vars(args), "overfit": None}))


def run_options(folder, **more):
    """What utils.Run asks of a script's options."""
    return SimpleNamespace(**{"output_dir": str(folder), "device": "cpu", "seed": 0, "deterministic": False,
                              "amp": "off", "resume": None, "overwrite": False, "demo": False, **more})


def test_a_gradient_that_is_not_finite_is_not_used_even_if_the_loss_is(tmp_path):
    """Hand-made step: ten in a row end the run; with nothing that counts the gradient is 0, not missing."""
    args = run_options(tmp_path, world_size=1)
    run, net = utils.Run(args, "linear"), torch.nn.Linear(2, 1)
    run.parts, run.progress, run.items, run.buffers = {"model": net}, {"bad_steps": 0, "skipped": 0, "images": 0,
                                                                       "loss": 0.0, "count": 0.0}, [("a.png",)], []
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    assert run.finish_gradient(optimizer, 0.0, 0) and all(not p.grad.any() for p in net.parameters())
    for step in range(9):
        for p in net.parameters():
            p.grad = torch.full_like(p, float("inf"))
        assert not run.finish_gradient(optimizer, 1.0, 1)
    with pytest.raises(utils.InputError, match="ten times in a row, last on a.png"):
        run.finish_gradient(optimizer, 1.0, 1)


def test_a_loop_over_items_ends_after_the_one_in_which_a_signal_came(monkeypatch):
    monkeypatch.setattr(utils, "_signals", [])
    assert [*utils.until_stopped(range(3), "reading")] == [0, 1, 2]
    seen = []
    with pytest.raises(utils.Stopped):
        for item in utils.until_stopped(range(5), "reading"):
            seen.append(item)
            if item == 2:
                utils._signals.append(15)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("others", [0, 1])
def test_processes_that_do_not_see_the_same_checkpoint_are_told(tmp_path, monkeypatch, others):
    """Two ranks: this one has a last.pth, the other none or one of another step."""
    state = {"format": utils.FORMAT, "model": {}, "optimizer": {}, "args": {"weights": "none"}, "epoch": 2, "step": 5}
    utils.save_checkpoint(tmp_path / "last.pth", state)
    monkeypatch.setattr(utils, "ranks", lambda: (0, 2))
    monkeypatch.setattr(utils, "merge_over_ranks", lambda found: {**found, 1: [None, (2, 4)][others]})
    args = run_options(tmp_path, resume="auto")
    with pytest.raises(utils.InputError, match="the processes do not see the same last.pth"):
        utils.Run(args, "linear")
    monkeypatch.setattr(utils, "merge_over_ranks", lambda found: {**found, 1: (2, 5)})
    assert utils.Run(args, "linear").checkpoint["epoch"] == 2


def test_what_is_random_on_the_device_depends_on_seed_epoch_step_and_rank(tmp_path, monkeypatch):
    """Dropout: the same when the epoch is resumed, another in each step, epoch and process."""
    def draw(epoch, step, rank):
        args = run_options(tmp_path, accumulate=1, batch_size=1, workers=0, save_every=0)
        run, net = utils.Run(args, "linear"), torch.nn.Linear(2, 1)
        run.rank, run.parts = rank, {"model": net, "optimizer": torch.optim.SGD(net.parameters(), 1)}
        run.progress = {"epoch": epoch, "step": step, "images": 0, "loss": 0.0, "count": 0.0}
        dataset = Numbers()
        dataset.items = [(str(i),) for i in range(4)]
        return [torch.rand(()).item() for _ in run.steps(utils.create_loader(dataset, args, shuffle=True))]
    whole = draw(0, 0, 0)
    assert len(set(whole)) == 4 and draw(0, 2, 0) == whole[2:]
    assert not set(whole) & {*draw(1, 0, 0), *draw(0, 0, 1)}


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, key):
        return torch.zeros(1), key[1]


@pytest.mark.parametrize("name", ["train_unet", "train_deeplabv3", "train_efficientsam", "finetune_sam_decoder"])
def test_demo_settings_take_the_place_of_defaults_and_options_that_of_demo_settings(name):
    script = importlib.import_module(name)
    args = script.get_args_parser().parse_args(["--demo"])
    assert {key: getattr(args, key) for key in script.DEMO} == script.DEMO
    args = script.get_args_parser().parse_args(["--demo", "--epochs", "3", "--output-dir", "x"])
    assert (args.epochs, args.output_dir) == (3, "x") and args.lr == script.DEMO["lr"]


def test_objects_too_small_for_the_masks_cells_are_noted(capsys):
    widths = [0.02, 0.05, 0.9]  # of the square's side: half are at most 0.05 * 192 / 4 = 2.4 cells wide
    utils.note_small_objects(widths, 192)
    said = capsys.readouterr().out
    assert "at most 2.4 cells" in said and "a cell is 4 pixels" in said and "--image-size 640 gives them 8" in said
    utils.note_small_objects(widths, 640)
    utils.note_small_objects(widths, 320, cell=2)
    assert not capsys.readouterr().out
