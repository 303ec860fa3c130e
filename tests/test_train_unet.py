"""train_unet.py: data, losses and metrics against numbers worked by hand and official ones; training; bad input."""
import csv
import json
import math
import shutil
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import nets.unet
import train_unet
import utils
from conftest import ROOT, save_grey

FIXTURES = ROOT / "tests/fixtures"
CPU = Namespace(device=torch.device("cpu"), dtype=None, pinned=False)  # what evaluate needs of a run
SMALL = ["--arch", "UNet", "--image-size", "32", "-b", "4", "-j", "0", "--device", "cpu", "--optimizer", "Adam"]


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    """Nets of a quarter of the width, which train in no time."""
    monkeypatch.setattr(nets.unet, "CHANNELS", (8, 16, 32, 64, 128))


def options(*texts):
    return train_unet.get_args_parser().parse_args([str(text) for text in texts])


def train(folder, output, *more):
    return train_unet.main(options("--data-path", folder, "--output-dir", output, *SMALL, *more))


def refuses(folder, *expected, more=(), output=None):
    """main refuses the folder in one line that holds these words, and leaves no checkpoint."""
    output = output or folder / "run"
    with pytest.raises(utils.InputError) as caught:
        train(folder, output, "--epochs", 1, *more)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message
    assert not (output / "last.pth").exists()
    return message


# --- Losses and metrics ---

@pytest.mark.parametrize("case", ["bcedice_b2c1", "bcedice_b3c2", "bcedice_empty", "bcedice_full", "bcedice_soft",
                                  "lovasz_b2c1", "lovasz_b3c2", "lovasz_empty", "lovasz_full"])
def test_losses_and_their_gradients_equal_the_official_ones(case):
    with np.load(FIXTURES / "losses.npz", allow_pickle=False) as reference:
        logits, target, loss, grad = (torch.from_numpy(np.asarray(reference[f"{case}/{key}"]))
                                      for key in ("logits", "target", "loss", "grad"))
    logits.requires_grad_()
    ours = train_unet.criterion(logits, target, "BCEDiceLoss" if case.startswith("bce") else "LovaszHingeLoss")
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert torch.allclose(logits.grad, grad, rtol=1e-4, atol=1e-7)


def test_pixel_counts_give_the_official_pooled_iou():
    """The official iou_score pools the batch: our counts, summed over images and classes, must give the same."""
    with np.load(FIXTURES / "metrics.npz", allow_pickle=False) as reference:
        cases = {key.split("/")[0] for key in reference.files if key.startswith("m_")}
        assert "m_bothempty" in cases and len(cases) > 2
        for case in cases:
            logits, target = (torch.from_numpy(reference[f"{case}/{key}"]) for key in ("logits", "target"))
            both, pred, true = train_unet.count_pixels(logits > 0, target > 0.5).sum(0).tolist()
            iou = (both + 1e-5) / (pred + true - both + 1e-5)
            assert iou == pytest.approx(float(reference[f"{case}/iou"]), abs=1e-6), case


def test_scores_of_a_hand_worked_4x4_mask():
    pred, mask = torch.zeros(1, 2, 4, 4, dtype=torch.bool), torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    pred[0, 0, :2] = True     # 8 pixels predicted
    mask[0, 0, 1:3] = True    # 8 true, 4 of them predicted: IoU 4 / 12, Dice 8 / 16; class 1 is nowhere
    iou, dice = train_unet.scores(train_unet.count_pixels(pred, mask))
    assert iou[0] == pytest.approx(1 / 3) and dice[0] == pytest.approx(1 / 2)
    assert math.isnan(iou[1]) and math.isnan(dice[1])


class Copy(torch.nn.Module):
    """A net whose logit is what stands in the image's first channel."""
    def forward(self, image):
        return image[:, :1]


def test_evaluation_counts_over_the_set_and_over_images_whatever_the_batch_size():
    # two images: one predicted perfectly (32 pixels), one with 32 predicted and none of the 32 true found
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    mask[0, 0, :4], mask[1, 0, 4:] = 1, 1
    logits = torch.full((2, 3, 8, 8), -9.0)
    logits[:, :, :4] = 9.0
    results = []
    for batches in ([(logits, mask, [0, 1])], [(logits[:1], mask[:1], [0]), (logits[1:], mask[1:], [1])]):
        results.append(train_unet.evaluate(Copy(), batches, CPU, Namespace(loss="BCEDiceLoss")))
    for figures in results:
        assert figures["val_iou"] == pytest.approx(32 / 96)         # 32 in both, 64 predicted, 64 true
        assert figures["val_image_iou"] == pytest.approx(0.5)       # mean of 1 and 0
        assert figures["val_image_dice"] == pytest.approx(0.5)
        assert figures["class_dice"] == pytest.approx([64 / 128])
        losses = [train_unet.criterion(logits[k:k + 1, :1], mask[k:k + 1].float(), "BCEDiceLoss") for k in (0, 1)]
        assert figures["val_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-6)


def test_masks_are_compared_at_the_images_own_size():
    mask = torch.zeros(1, 1, 64, 48, dtype=torch.uint8)
    mask[..., :32, :] = 1
    logits = torch.full((1, 3, 16, 16), -9.0)
    logits[:, :, :8] = 9.0
    figures = train_unet.evaluate(Copy(), [(logits, mask, [0])], CPU, Namespace(loss="BCEDiceLoss"))
    assert figures["val_iou"] == 1.0


def test_sizes_that_are_no_multiple_of_16_are_padded_and_cropped():
    image, seen = torch.randn(1, 3, 35, 50), []

    def net(padded):
        """Each pixel gets its neighbour's value, to the right and below."""
        seen.append(padded)
        return padded[:, :1].roll((-1, -1), (2, 3))
    logits = train_unet.forward(net, image, None)[-1]
    assert seen[0].shape == (1, 3, 48, 64) and torch.equal(logits[..., :-1, :-1], image[:, :1, 1:, 1:])
    assert torch.equal(logits[0, 0, -1, :-1], image[0, 0, -1, 1:])  # borders are replicated


# --- Data ---

def test_the_split_is_the_articles_train_test_split():
    """sklearn 1.9.1: train_test_split(range(13), test_size=0.2, random_state=41)[1] is [7, 4, 9]."""
    items = [(i, f"image {i}") for i in range(13)]
    train_items, val_items = utils.split_items(items, options("--data-path", "x"))
    assert [item[0] for item in val_items] == [4, 7, 9] and sorted(train_items + val_items) == items


def test_image_and_mask_turn_together_and_augmentation_follows_seed_epoch_index(cells):
    items, _ = train_unet.find_items(cells, options())
    dataset = train_unet.MaskFolders(items, ["0"], options("--image-size", 48), train=True, augment=True)
    seen = set()
    for epoch in range(12):
        plain = dataset[epoch, 3]
        torch.rand(7)  # the global generator must not matter
        again = dataset[epoch, 3]
        assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
        seen.add(bytes(plain[1].numpy()))
    assert len(seen) > 4  # of the eight turns and flips
    image, mask = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    image[3:9, 5:20] = mask[3:9, 5:20] = 255
    Image.fromarray(image).save(cells / "images/cell_3.png")
    save_grey(cells / "masks/0/cell_3.png", mask)
    dataset = train_unet.MaskFolders(items, ["0"], options("--image-size", 32), train=True, augment=True)
    for epoch in range(12):
        image, mask, _ = dataset[epoch, 3]
        assert torch.equal(image[0] > image[0].mean(), mask[0] > 0)


def test_nothing_is_cut_off_when_a_wide_image_turns_and_its_colours_vary(cells):
    Image.new("RGB", (60, 20), (90, 130, 170)).save(cells / "images/cell_3.png")
    mask = np.zeros((20, 60), np.uint8)
    mask[:, :6] = 255  # a tenth, at one end
    save_grey(cells / "masks/0/cell_3.png", mask)
    items, _ = train_unet.find_items(cells, options())
    dataset = train_unet.MaskFolders(items, ["0"], options("--image-size", 40), train=True, augment=True)
    images, masks, _ = zip(*[dataset[epoch, 3] for epoch in range(40)])
    assert [mask.mean().item() for mask in masks] == pytest.approx([0.1] * 40, rel=1e-4)
    assert {(mask[0, 0, -1] > 0.9).item() for mask in masks} == {False, True}
    grey = torch.stack(images).mean((2, 3)) @ torch.tensor([0.229, 0.224, 0.225]) / 3 + 0.449  # of 0.51
    assert grey.unique().numel() > 20 and 0.06 < grey.max() / 0.51 - 1 < 0.21 and 0.06 < 1 - grey.min() / 0.51 < 0.21


@pytest.mark.parametrize("more", [["--image-size", "48,32"], ["--input_w", 48, "--input_h", 32]])
def test_sizes_are_width_and_height(cells, tmp_path, monkeypatch, more):
    forward, seen = train_unet.forward, set()
    monkeypatch.setattr(train_unet, "forward", lambda model, image, dtype: (
        seen.add(image.shape[1:]), forward(model, image, dtype))[1])
    train(cells, tmp_path / "run", "--epochs", 1, "--limit", 2, *more)
    assert seen == {(3, 32, 48)}


def test_masks_shrink_without_a_shift_against_the_image(cells):
    """Mirrored image in, mirrored mask out; and the small mask covers what the small image shows bright."""
    mask = np.zeros((48, 48), np.uint8)
    mask[9:30, 7:22] = 255
    small = []
    for name, pixels in (("cell_0", mask), ("cell_1", mask[:, ::-1])):
        Image.fromarray(np.stack([pixels] * 3, 2)).save(cells / f"images/{name}.png")
        save_grey(cells / f"masks/0/{name}.png", pixels)
    items, _ = train_unet.find_items(cells, options())
    dataset = train_unet.MaskFolders(items, ["0"], options("--image-size", 36), train=True, augment=False)
    for index in (0, 1):
        image, mask, _ = dataset[0, index]
        bright = (image[0] - image[0].min()) / (image[0].max() - image[0].min())
        torch.testing.assert_close(bright, mask[0], atol=0.01, rtol=0)
        assert mask.sum().item() == pytest.approx(21 * 15 * (36 / 48) ** 2, rel=1e-3)  # the area stays
        small.append(mask)
    torch.testing.assert_close(small[0], small[1].flip(-1))


def test_normalisation_happens_once_and_in_rgb():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[0] = 255  # pure red
    out = train_unet.normalize(image, 3)
    assert out[:, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225], rel=1e-5)


def test_masks_of_every_honest_kind_read_alike(cells):
    mask = np.array(Image.open(cells / "masks/0/cell_0.png"))
    item = ("cell_0", cells / "images/cell_0.png", [cells / "mask.png"])
    kinds = {"grey": mask, "rgb": np.stack([mask] * 3, 2), "one bit": mask > 0, "16 bit": mask.astype(np.uint16) * 257,
             "rgba": np.dstack([mask] * 3 + [np.full_like(mask, 255)]), "soft": np.where(mask, 255, 0).astype(np.uint8)}
    kinds["soft"][0, :3] = (30, 100, 140)
    for kind, pixels in kinds.items():
        Image.fromarray(pixels).save(cells / "mask.png")
        expected = (pixels if kind == "soft" else mask) >= 128
        assert np.array_equal(train_unet.read_item(item)[1][0], expected), kind


@pytest.mark.parametrize("quality", [75, 95])
def test_jpeg_masks_are_cut_at_half(cells, quality):
    mask = Image.open(cells / "masks/0/cell_0.png")
    mask.save(cells / "mask.jpg", quality=quality)
    read = train_unet.read_item(("cell_0", cells / "images/cell_0.png", [cells / "mask.jpg"]))[1][0]
    assert (read != (np.array(mask) > 0)).mean() < 0.01


def test_soft_edges_on_an_empty_or_full_mask(cells):
    item = ("cell_0", cells / "images/cell_0.png", [cells / "mask.png"])
    for value in (0, 255):
        save_grey(cells / "mask.png", np.full((48, 48), value, np.uint8))
        assert (train_unet.read_item(item)[1] == (value > 0)).all()


def test_classes_in_folders_may_overlap(cells, tmp_path, capsys):
    for name in ("10", "9", "edge"):
        shutil.copytree(cells / "masks/0", cells / "masks" / name)
    items, classes = train_unet.find_items(cells, options("--num_classes", 4))
    assert classes == ["0", "9", "10", "edge"]
    lines = ["\ufeffperson ", *["x"] * 8, "", "\u72d7/dog", "y"]  # of 0 to 11; as convert_labels.py writes them
    (cells / "masks/classes.txt").write_bytes("\r\n".join(lines).encode())
    figures = train(cells, tmp_path / "run", "--num_classes", 4, "--epochs", 1)
    assert len(figures["class_iou"]) == 4 and "  class person over the set: IoU " in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "run/best.pth", weights_only=True)
    assert checkpoint["classes"] == ["person", "9", "\u72d7/dog", "edge"]


@pytest.mark.parametrize("text, words", [
    ("cat\ncat\n", ["classes cat and cat have one name"]), ("a/b\na_b", ["classes a/b and a_b have one name"]),
    ("1\n", ["classes 1 and 1 have one name"]), ("Cat\ncat", ["classes Cat and cat have one name"]),
    (b"\xff\xfec\0", ["not UTF-8 text; save it as UTF-8"])])
def test_names_of_classes_that_cannot_be(cells, text, words):
    shutil.copytree(cells / "masks/0", cells / "masks/1")
    (cells / "masks/classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    refuses(cells, cells / "masks/classes.txt", *words, more=["--num-classes", 2])


def test_masks_may_lie_without_a_class_folder(cells):
    (cells / "masks/0").rename(cells / "plain")
    shutil.rmtree(cells / "masks")
    (cells / "plain").rename(cells / "masks")
    items, _ = train_unet.find_items(cells, options())
    assert len(items) == 10 and items[0][2] == [cells / "masks/cell_0.png"]


def test_a_split_is_written_and_read_again(cells, tmp_path):
    train(cells, tmp_path / "a", "--epochs", 1)
    split = json.loads((tmp_path / "a/split.json").read_text())
    assert len(split["train"]) == 8 and len(split["val"]) == 2
    train(cells, tmp_path / "b", "--epochs", 1, "--seed", 3, "--split", tmp_path / "a/split.json")
    assert json.loads((tmp_path / "b/split.json").read_text()) == split
    train(cells, tmp_path / "c", "--epochs", 1, "--seed", 3)
    assert json.loads((tmp_path / "c/split.json").read_text()) != split


# --- Training ---

def test_eight_images_can_be_learnt_and_every_file_is_written(cells, tmp_path, capsys):
    figures = train(cells, tmp_path / "run", "--epochs", 20, "--overfit", 8, "-b", 2, "--image-size", 48, "--lr", 0.003)
    assert figures["val_iou"] > 0.7
    for name in ("last.pth", "best.pth", "model.pth", "log.csv", "curves.png", "val_samples.png", "args.json",
                 "split.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    printed = capsys.readouterr().out
    assert "UNet: 492,609 of 492,609 parameters trained" in printed and "best val_iou" in printed
    tested = train(cells, tmp_path / "other", "--overfit", 8, "--image-size", 48, "--test-only",
                   "--resume", tmp_path / "run/last.pth")
    assert {key: tested[key] for key in tested} == {key: figures[key] for key in tested}
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("more", [
    ["--arch", "NestedUNet", "--deep_supervision", "True"], ["--loss", "LovaszHingeLoss"],
    ["--loss", "BCEWithLogitsLoss"], ["--optimizer", "SGD", "--nesterov", "true"], ["--input_channels", "1"],
    ["--input_w", "48", "--input_h", "32"], ["--image-size", "50,35"],
    ["--accumulate", "2"], ["--amp", "bf16"], ["-b", "1"], ["-b", "64"], ["--limit", "3"]])
def test_every_option_trains(cells, tmp_path, more):
    figures = train(cells, tmp_path / "run", "--epochs", 1, *more)
    assert math.isfinite(figures["val_loss"])
    assert all(p.isfinite().all() for p in torch.load(tmp_path / "run/last.pth", weights_only=True)["model"].values())


def test_depth_tests_a_deeply_supervised_net_cut_short(cells, tmp_path):
    deep = ["--arch", "NestedUNet", "--deep-supervision"]
    train(cells, tmp_path / "run", "--epochs", 3, *deep)
    figures = [train(cells, tmp_path / "x", *deep, "--test-only", "--weights", tmp_path / "run/last.pth", *more)
               for more in ([], ["--depth", 4], ["--depth", 1])]
    assert figures[0] == figures[1] and figures[0]["val_loss"] != figures[2]["val_loss"]
    refuses(cells, "--depth", "--test-only", more=[*deep, "--depth", 2])
    refuses(cells, "--depth", "--deep-supervision", more=["--test-only", "--depth", 2, "--weights", "x.pth"])


@pytest.mark.parametrize("scheduler, expected", [
    ("CosineAnnealingLR", [1e-3, 1e-5 + 99e-5 * (1 + math.cos(math.pi / 4)) / 2, 1e-5 + 99e-5 / 2,
                           1e-5 + 99e-5 * (1 + math.cos(3 * math.pi / 4)) / 2]),
    ("MultiStepLR", [1e-3, 2e-3 / 3, 4e-3 / 9, 4e-3 / 9]), ("ConstantLR", [1e-3] * 4),
    ("ReduceLROnPlateau", [1e-3, 1e-3, 1e-3, 1e-4])])
def test_schedules_really_step_and_the_log_shows_the_rate_used(cells, tmp_path, monkeypatch, scheduler, expected):
    evaluate, losses = train_unet.evaluate, iter([1.0, 0.5, 0.6, 0.7])  # improves, then no more
    monkeypatch.setattr(train_unet, "evaluate", lambda *args: {**evaluate(*args), "val_loss": next(losses)})
    train(cells, tmp_path / "run", "--scheduler", scheduler, "--epochs", 4, "--patience", 0, "--limit", 2)
    rates = [float(line.split(",")[2]) for line in (tmp_path / "run/log.csv").read_text().splitlines()[1:]]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_optimizers_have_the_options_given():
    more = ["--lr", 3, "--weight-decay", 0.25, "--momentum", 0.5, "--nesterov", "true"]
    made = train_unet.create_optimizer(torch.nn.Linear(2, 1), options("--optimizer", "SGD", *more)).defaults
    assert [made[key] for key in ("lr", "weight_decay", "momentum", "nesterov")] == [3, 0.25, 0.5, True]
    made = train_unet.create_optimizer(torch.nn.Linear(2, 1), options("--optimizer", "Adam", *more[:4])).defaults
    assert (made["lr"], made["weight_decay"]) == (3, 0.25)


def test_the_iou_in_training_is_of_pixels_covered_by_half(cells, tmp_path, monkeypatch):
    """A net that calls every pixel a cell has their share."""
    class Everything(torch.nn.Conv2d):
        def forward(self, image):
            return super().forward(image) * 0 + 9
    monkeypatch.setitem(train_unet.NETS, "UNet", lambda num_classes, input_channels: Everything(3, 1, 1))
    train(cells, tmp_path / "run", "--epochs", 1, "--overfit", 8, "--image-size", 36)
    split = json.loads((tmp_path / "run/split.json").read_text())["train"]
    items = [item for item in train_unet.find_items(cells, options())[0] if item[0] in split]
    dataset = train_unet.MaskFolders(items, ["0"], options("--image-size", 36), train=True, augment=False)
    masks = torch.stack([dataset[0, k][1] for k in range(8)])
    with open(tmp_path / "run/log.csv") as file:
        logged = next(csv.DictReader(file))["iou"]
    assert float(logged) == pytest.approx((masks >= 0.5).float().mean().item(), rel=1e-3)
    assert (masks > 0).float().mean() > 1.02 * (masks >= 0.5).float().mean()


def test_the_panel_shows_image_truth_and_prediction(cells, tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(utils, "save_panel", lambda path, rows, *_: panels.append(rows))
    train(cells, tmp_path / "run", "--epochs", 1, "--overfit", 8)
    for name, (image, truth, prediction) in panels[-1].items():
        mask = utils.read_mask(cells / f"masks/0/{name}.png") > 0
        assert np.array_equal(truth, train_unet.draw_mask(image, mask[None])) and not np.array_equal(truth, prediction)


def test_cosine_does_not_climb_again_when_resumed_with_more_epochs(cells, tmp_path):
    train(cells, tmp_path / "run", "--epochs", 2)
    train(cells, tmp_path / "run", "--epochs", 4, "--resume", "auto")
    rates = [float(line.split(",")[2]) for line in (tmp_path / "run/log.csv").read_text().splitlines()[1:]]
    assert rates[2:] == pytest.approx([1e-5 + 99e-5 * (1 + math.cos(math.pi * e / 4)) / 2 for e in (2, 3)], rel=1e-4)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(cells, tmp_path, monkeypatch):
    """With batch norm taken out, which sees each batch by itself, 2 x 4 equals 1 x 8; the uneven end (1 + 1) too."""
    monkeypatch.setitem(train_unet.NETS, "UNet", lambda num_classes, input_channels: torch.nn.Conv2d(
        input_channels, num_classes, 3, padding=1))
    for name, more in (("a", ["-b", 8]), ("b", ["-b", 4, "--accumulate", 2]), ("c", ["-b", 3, "--accumulate", 3])):
        train(cells, tmp_path / name, "--epochs", 2, *more)
    a, b, c = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"]["weight"] for name in "abc")
    assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a, c, atol=1e-6)


def test_demo_settings_are_defaults_that_the_command_line_overrides():
    args = options("--lr", 1e-3, "--demo")
    assert args.model == "UNet" and args.lr == 1e-3 and args.epochs == train_unet.DEMO["epochs"]
    assert options().model == "NestedUNet"


def test_weights_start_a_new_run(cells, tmp_path):
    train(cells, tmp_path / "a", "--epochs", 1)
    for name in ("best.pth", "model.pth"):
        train(cells, tmp_path / f"b{name}", "--epochs", 1, "--lr", 0, "--wd", 0, "--weights", tmp_path / "a" / name)
        a, b = (torch.load(path, weights_only=True)["model"]["final.weight"]
                for path in (tmp_path / "a/best.pth", tmp_path / f"b{name}/last.pth"))
        assert torch.equal(a, b)


def test_the_articles_command_line_runs_in_the_articles_folders(cells, tmp_path, monkeypatch):
    (tmp_path / "inputs").mkdir()
    cells.rename(tmp_path / "inputs/dsb2018_96")
    monkeypatch.chdir(tmp_path)
    train_unet.main(options(*"""--dataset dsb2018_96 --arch NestedUNet --deep_supervision True
        --name dsb2018_96_NestedUNet_wDS --epochs 1 --batch_size 4 --input_channels 3 --num_classes 1
        --input_w 32 --input_h 32 --loss BCEDiceLoss
        --img_ext .png --mask_ext .png --optimizer SGD --lr 1e-3 --momentum 0.9 --weight_decay 1e-4 --nesterov False
        --scheduler MultiStepLR --min_lr 1e-5 --factor 0.1 --patience 2 --milestones 1,2 --gamma 0.6667
        --early_stopping -1 --num_workers 0""".split()))
    assert (tmp_path / "models/dsb2018_96_NestedUNet_wDS/model.pth").exists()


def test_sanity_check_prints_counts_and_draws_a_panel(cells, tmp_path, capsys):
    save_grey(cells / "masks/0/cell_4.png", np.zeros((48, 48), np.uint8))
    train(cells, tmp_path / "run", "--sanity-check")
    printed = capsys.readouterr().out
    assert "train: 8 images, 8 of 48x48" in printed and "% of all pixels" in printed
    assert printed.count("1 images without it") == 1
    assert (tmp_path / "run/sanity_check.png").exists() and not (tmp_path / "run/last.pth").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sanity_check_shows_what_is_trained_in_the_image_s_own_colours(cells, tmp_path, monkeypatch, channels):
    """Without augmentation and at the image's size it is the image, as normalisation is undone."""
    image = np.random.default_rng(0).integers(20, 80, (48, 48), np.uint8)
    save_grey(cells / "images/cell_0.png", image if channels == 1 else np.dstack([image, image + 9, 200 - image]))
    panels = []
    monkeypatch.setattr(utils, "save_panel", lambda path, rows, titles, legend: panels.append(rows))
    train(cells, tmp_path / "run", "--sanity-check", "--overfit", 8, "--image-size", 48, "--input-channels", channels)
    _, mask, trained = panels[0]["cell_0"]
    assert np.abs(mask.astype(int) - trained).max() <= 1


# --- Bad input ---

def test_missing_folders(cells, tmp_path):
    refuses(tmp_path / "nowhere", tmp_path / "nowhere/images", "no such folder", "--data-path", output=tmp_path / "run")
    shutil.rmtree(cells / "masks")
    refuses(cells, cells / "masks", "no such folder")


def test_no_data_path():
    with pytest.raises(utils.InputError, match="--data-path.*--demo"):
        train_unet.main(options(*SMALL))


def test_empty_data_set(cells):
    for path in (cells / "images").iterdir():
        path.unlink()
    refuses(cells, cells / "images", "no images")


def test_missing_and_extra_masks(cells):
    (cells / "masks/0/cell_3.png").unlink()
    refuses(cells, "images/cell_3.png", "masks/0")
    (cells / "images/cell_3.png").unlink()
    (cells / "images/cell_5.png").unlink()
    refuses(cells, "masks/0/cell_5.png", "images")


def test_two_images_of_one_name(cells):
    shutil.copy(cells / "images/cell_3.png", cells / "images/cell_3.bmp")
    refuses(cells, "cell_3.png", "cell_3.bmp", "--img-ext")
    train_unet.find_items(cells, options("--img_ext", ".png"))


def grey_codes(width=8):
    """85, 170 and 255 side by side, each so many pixels wide."""
    mask = np.zeros((48, 48), np.uint8)
    for k in (1, 2, 3):
        mask[10:30, width * k:width * k + width] = 85 * k
    return mask


def voc_label(number, shape=(48, 48)):
    """An object of this id, with VOC's border of 255."""
    mask = np.zeros(shape, np.uint8)
    mask[8:40, 8:40] = 255
    mask[11:37, 11:37] = number
    return mask


@pytest.mark.parametrize("mask", [voc_label(1), voc_label(15), voc_label(128), grey_codes(), grey_codes(4),
                                  grey_codes() // 85 * 100])
def test_ids_with_a_border_of_255_and_grey_codes_are_no_binary_masks(cells, mask):
    save_grey(cells / "masks/0/cell_4.png", mask)
    refuses(cells, "cell_4.png: has values 0", "a mask holds 0 (background) and 255 (object)")


@pytest.mark.parametrize("blur", [lambda mask: cv2.resize(cv2.resize(mask, (20, 20), interpolation=cv2.INTER_AREA),
                                                          (48, 48)),
                                  lambda mask: cv2.GaussianBlur(mask, (0, 0), 3),
                                  lambda mask: cv2.imdecode(cv2.imencode(".jpg", mask)[1], cv2.IMREAD_GRAYSCALE)])
def test_soft_edges_are_cut_at_half(cells, blur):
    mask = np.zeros((48, 48), np.uint8)
    cv2.circle(mask, (24, 20), 11, 255, -1)
    mask[44:46] = 255  # a thin line too
    soft = blur(mask)
    assert len(np.unique(soft)) > 4
    save_grey(cells / "masks/0/cell_4.png", soft)
    items, _ = train_unet.find_items(cells, options())
    assert np.array_equal(train_unet.read_item(items[4])[1][0], soft >= 128)


def test_masks_beside_class_folders_are_not_ignored(cells):
    shutil.copy(cells / "masks/0/cell_1.png", cells / "masks/cell_1.png")
    refuses(cells, "masks/cell_1.png: lies beside class folders")


def test_a_split_beside_other_images_to_validate_on_is_refused(cells):
    refuses(cells, "--split: has no effect beside --val-path", more=["--split", "x.json", "--val-path", cells])


def test_a_test_reads_no_training_images(cells, tmp_path):
    names = [f"cell_{i}" for i in range(10)]
    (tmp_path / "split.json").write_text(utils.json.dumps({"train": names[:7], "val": names[7:]}))
    split = ["--split", tmp_path / "split.json"]
    figures = train(cells, tmp_path / "run", "--epochs", 1, *split)
    (cells / "images/cell_2.png").write_bytes(b"spoilt")
    tested = train(cells, tmp_path / "x", "--test-only", "--resume", tmp_path / "run/last.pth", *split)
    assert tested == {key: figures[key] for key in tested}


def test_sizes_that_differ_name_both_files_and_sizes(cells):
    save_grey(cells / "masks/0/cell_2.png", np.zeros((48, 40), np.uint8))
    refuses(cells, "masks/0/cell_2.png: 40x48", "images/cell_2.png has 48x48")


@pytest.mark.parametrize("pixels, words", [
    (np.eye(48, dtype=np.uint8), ["values 0, 1", "multiply a 0/1 mask by 255"]),
    ((np.arange(48 * 48).reshape(48, 48) // 20).astype(np.uint8), ["0 (background) and 255 (object)"]),
    ((np.arange(48 * 48).reshape(48, 48)).astype(np.uint16), ["0 (background) and 255 (object)"]),
    (np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8), ["colour-coded"]),
    (np.dstack([np.zeros((48, 48, 3)), np.eye(48) * 255]).astype(np.uint8), ["transparency"]),
    (np.eye(48, dtype=np.uint8) * 130, ["0 (background) and 255 (object)"])])
def test_masks_of_ids_and_of_colours_are_refused(cells, pixels, words):
    save_grey(cells / "masks/0/cell_7.png", pixels)
    refuses(cells, cells / "masks/0/cell_7.png", *words)


@pytest.mark.parametrize("kind", ["images", "masks/0"])
def test_truncated_and_foreign_files(cells, kind):
    path = cells / kind / "cell_6.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) * 2 // 3])
    refuses(cells, path, "truncated or unreadable")
    path.write_bytes(b"no image")
    refuses(cells, path, "not an image")


def test_class_folders_and_num_classes_disagree(cells):
    shutil.copytree(cells / "masks/0", cells / "masks/1")
    refuses(cells, "2 class folders (0, 1)", "--num-classes 2")


def test_masks_without_any_object(cells):
    for path in (cells / "masks/0").iterdir():
        save_grey(path, np.zeros((48, 48), np.uint8))
    refuses(cells, cells / "masks/0", "none of 8 masks has an object")


def test_one_image_cannot_be_split(cells):
    for i in range(1, 10):
        (cells / f"images/cell_{i}.png").unlink(), (cells / f"masks/0/cell_{i}.png").unlink()
    refuses(cells, "--val-path")


@pytest.mark.parametrize("text", [
    "{", "[]", '{"train": ["cell_0"]}', '{"train": ["cell_0"], "val": ["elsewhere"]}', None])
def test_bad_splits(cells, tmp_path, text):
    if text is not None:
        (tmp_path / "split.json").write_text(text)
    refuses(cells, tmp_path / "split.json", more=["--split", tmp_path / "split.json"])


def test_a_image_in_both_parts_of_a_split_is_refused(cells, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"train": ["cell_0", "cell_1"], "val": ["cell_1", "cell_2"]}))
    refuses(cells, "2 training and 2 validation images, 1 in both", more=["--split", tmp_path / "split.json"])
    (tmp_path / "split.json").write_text('{"train": ["cell_0"], "val": []}')
    refuses(cells, "1 training and 0 validation", more=["--split", tmp_path / "split.json"])
    refuses(cells, "10 in both", more=["--val-path", cells])


def test_classes_of_training_and_validation_must_agree(cells, tmp_path):
    shutil.copytree(cells, tmp_path / "val")
    for folder, names in ((cells, ("cell", "edge")), (tmp_path / "val", ("cell", "rim"))):
        shutil.copytree(folder / "masks/0", folder / "masks" / names[1])
        (folder / "masks/0").rename(folder / "masks" / names[0])
    more = ["--num-classes", 2, "--val-path", tmp_path / "val"]
    refuses(cells, "['cell', 'rim']", "['cell', 'edge']", more=more)
    for folder, names in ((cells, "cat\ndog"), (tmp_path / "val", "dog\ncat")):
        for k, path in enumerate(sorted(path for path in (folder / "masks").iterdir() if path.is_dir())):
            path.rename(folder / f"masks/{k}")
        (folder / "masks/classes.txt").write_text(names)
    refuses(cells, "['dog', 'cat']", "['cat', 'dog']; use the same folders and classes.txt", more=more)


def test_testing_on_other_images_or_at_another_size_is_said(cells, tmp_path, capsys):
    train(cells, tmp_path / "run", "--epochs", 1)
    weights = ["--test-only", "--weights", tmp_path / "run/best.pth"]
    capsys.readouterr()
    train(cells, tmp_path / "x", *weights)
    assert "note:" not in capsys.readouterr().out
    train(cells, tmp_path / "x", *weights, "--seed", 3)
    assert "some may have been trained on" in capsys.readouterr().out
    refuses(cells, "--image-size (48, 48): trained with (32, 32)", more=[*weights, "--image-size", 48])


@pytest.mark.parametrize("more, words", [
    (["--arch", "UNet", "--deep_supervision", "1"], ["--deep-supervision", "NestedUNet"]),
    (["--optimizer", "SGD", "--nesterov", "--momentum", "0"], ["--nesterov", "--momentum"]),
    (["--optimizer", "Adam", "--nesterov"], ["--nesterov", "--optimizer SGD"]),
    (["--resume", "auto", "--overwrite"], ["--overwrite", "--resume"]),
    (["--device", "cuda:7"], ["--device cuda:7", "not on this machine"]), (["--device", "tpu9"], ["--device tpu9"]),
    (["--amp", "fp16"], ["--amp fp16", "CUDA"]), (["--weights", "none.pth"], ["none.pth", "no such file"]),
    (["--resume", "none.pth"], ["none.pth", "no such file"]),
    (["--test-only"], ["--test-only", "--weights or --resume"])])
def test_options_that_cannot_be(cells, more, words):
    refuses(cells, *words, more=more)


@pytest.mark.parametrize("more", [["--epochs", "0"], ["--lr", "nan"], ["--lr", "-1"], ["-b", "x"], ["--epoch", "3"],
                                  ["--deep_supervision", "maybe"], ["--image-size", "8"], ["--milestones", "a,b"],
                                  ["--image-size", "1,2,3"]])
def test_bad_numbers_are_one_line_and_exit_status_2(more, capsys):
    with pytest.raises(SystemExit) as caught:
        options(*more)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ": error: " in error and more[0].replace("_", "-") in error


def test_a_checkpoint_of_another_net_or_other_classes_names_both(cells, tmp_path):
    train(cells, tmp_path / "a", "--epochs", 1)
    for option, name, found in (("--weights", "best.pth", "model UNet"), ("--resume", "last.pth", "model UNet"),
                                ("--weights", "model.pth", "than NestedUNet: 87 of 212 tensors missing")):
        refuses(cells, tmp_path / "a" / name, found, "NestedUNet",
                more=["--arch", "NestedUNet", option, tmp_path / "a" / name])
    shutil.copytree(cells / "masks/0", cells / "masks/1")
    for name, words in (("best.pth", "num_classes 1"), ("model.pth", "--num-classes as trained")):
        refuses(cells, name, words, more=["--test-only", "--num-classes", 2, "--weights", tmp_path / "a" / name])


@pytest.mark.parametrize("name", ["best.pth", "model.pth"])
def test_weights_of_other_classes_start_all_but_the_last_layer(cells, tmp_path, capsys, name):
    train(cells, tmp_path / "a", "--epochs", 1)
    shutil.copytree(cells / "masks/0", cells / "masks/1")
    args = options("--num-classes", 2, "--weights", tmp_path / "a" / name, *SMALL)
    model, before = train_unet.create_model(args)[0].state_dict(), utils.load_checkpoint(tmp_path / "a/model.pth")
    assert f"{name}: final.weight, final.bias start fresh" in capsys.readouterr().out
    assert model["final.weight"].shape[0] == 2
    assert all(torch.equal(model[key], before[key]) for key in before if not key.startswith("final"))
    train(cells, tmp_path / "b", "--epochs", 1, "--num-classes", 2, "--weights", tmp_path / "a" / name)


def test_all_heads_of_a_deeply_supervised_net_start_fresh_for_other_classes(tmp_path, capsys):
    more = ["--arch", "NestedUNet", "--deep-supervision", "--num-classes"]
    torch.save(train_unet.create_model(options(*more, 1))[0].state_dict(), tmp_path / "one.pth")
    train_unet.create_model(options(*more, 2, "--weights", tmp_path / "one.pth"))
    said = capsys.readouterr().out
    assert all(f"final{k}.weight, final{k}.bias" in said for k in range(1, 5))


def test_real_nuclei_pass_the_sanity_check(real_data, tmp_path, capsys):
    train(real_data / "nuclei", tmp_path / "run", "--sanity-check")
    printed = capsys.readouterr().out
    assert "train: 93 images, 60 of 256x256" in printed and "val: 24 images, 10 of 256x256" in printed


def test_a_resumed_plateau_remembers_its_bad_epochs(cells, tmp_path, monkeypatch):
    """The loss never gets better, and the rate falls in the same epochs, stopped or not."""
    evaluate = train_unet.evaluate
    monkeypatch.setattr(train_unet, "evaluate", lambda *args: {**evaluate(*args), "val_loss": 1.0})
    more = ["--scheduler", "ReduceLROnPlateau", "--patience", 0, "--lr", 0.1]
    train(cells, tmp_path / "a", "--epochs", 4, *more)
    for epoch in (1, 2, 4):
        train(cells, tmp_path / "b", "--epochs", epoch, "--resume", "auto", *more)
    rates = [[line.split(",")[2] for line in (tmp_path / name / "log.csv").read_text().splitlines()] for name in "ab"]
    assert rates[0] == rates[1] and len(set(rates[0])) == 4  # the title, and two falls


class Scaler:
    """Does what a GradScaler does for fp16, on the CPU, with a scale of 8."""

    def __init__(self):
        self.calls = []

    def scale(self, loss):
        return 8 * loss

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad /= 8

    def step(self, optimizer):
        self.calls.append("step")
        optimizer.step()

    def update(self):
        self.calls.append("update")

    def get_scale(self):
        return 8.0

    def state_dict(self):
        return {}


def test_a_scaled_loss_trains_as_an_unscaled_one(cells, tmp_path, monkeypatch):
    train(cells, tmp_path / "a", "--epochs", 1, "--lr", 0.1)
    scaler = Scaler()
    monkeypatch.setattr(utils, "pick_precision", lambda amp, device: (None, scaler))
    train(cells, tmp_path / "b", "--epochs", 1, "--lr", 0.1)
    a, b = (torch.load(tmp_path / name / "best.pth", weights_only=True)["model"] for name in "ab")
    assert scaler.calls == ["unscale", "step", "update"] * 2
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-4)
