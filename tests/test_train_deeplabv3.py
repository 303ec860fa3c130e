"""train_deeplabv3.py: data, loss and metrics against numbers worked by hand and official ones; training; bad input."""
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_deeplabv3 as script_
import utils
from conftest import ROOT, save_grey

FIXTURES = ROOT / "tests/fixtures"
SMALL = ["--backbone", "demo", "--weights", "none", "--num-classes", "3", "--base-size", "48",
         "--crop-size", "48", "-b", "4", "-j", "0", "--device", "cpu"]
MOBILENET = ["--backbone", "mobilenet_v3_large"]  # where weights of torchvision's are meant
CPU = Namespace(device=torch.device("cpu"), dtype=None, pinned=False)  # what evaluate needs of a run


def options(*texts):
    return script_.get_args_parser().parse_args([str(text) for text in texts])


def train(folder, output, *more):
    return script_.main(options("--data-path", folder, "--output-dir", output, *SMALL, *more))


def refuses(folder, *expected, more=()):
    """main refuses the folder in one line that holds these words, and leaves no checkpoint."""
    output = folder.parent / "refused"
    with pytest.raises(utils.InputError) as caught:
        train(folder, output, "--epochs", 1, *more)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message
    assert not (output / "last.pth").exists()


def voc(folder, *parts):
    return folder.joinpath("VOCdevkit/VOC2012", *parts)


# --- Loss, metrics, schedule ---

def test_loss_is_torchs_mean_over_labelled_pixels_plus_half_the_auxiliary():
    torch.manual_seed(0)
    outputs = {"out": torch.randn(2, 4, 5, 6, requires_grad=True), "aux": torch.randn(2, 4, 5, 6)}
    label = torch.randint(0, 4, (2, 5, 6), dtype=torch.uint8)
    label[0, :3] = 255
    expected = [F.cross_entropy(outputs[name], label.long(), ignore_index=255) for name in ("out", "aux")]
    assert script_.criterion(outputs, label).item() == pytest.approx((expected[0] + 0.5 * expected[1]).item(), rel=1e-6)
    assert script_.criterion({"out": outputs["out"]}, label).item() == pytest.approx(expected[0].item(), rel=1e-6)


def test_a_batch_of_void_has_loss_0_and_no_gradient():
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    loss = script_.criterion({"out": logits}, torch.full((2, 5, 6), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("case", ["conf_4", "conf_6_absent"])
def test_confusion_matrix_and_figures_equal_the_official_ones(case):
    with np.load(FIXTURES / "metrics.npz", allow_pickle=False) as file:
        reference = {key: file[f"{case}/{key}"] for key in ("target", "pred", "mat", "acc_global", "acc", "iou",
                                                            "miou_present")}
    label, pred = (torch.from_numpy(reference[key]) for key in ("target", "pred"))
    counts = script_.count_pixels(pred.long(), label, len(reference["mat"]))
    assert np.array_equal(counts.numpy(), reference["mat"])
    figures = script_.scores(counts)
    assert figures["accuracy"] == pytest.approx(float(reference["acc_global"]), abs=1e-6)
    assert figures["miou"] == pytest.approx(float(reference["miou_present"]), abs=1e-6)
    assert figures["class_iou"] == pytest.approx(reference["iou"].tolist(), abs=1e-6, nan_ok=True)
    assert figures["class_accuracy"] == pytest.approx(reference["acc"].tolist(), abs=1e-6, nan_ok=True)


def test_figures_of_a_hand_worked_4x4_image():
    label = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 255, 255], [3, 3, 3, 3]])
    pred = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 2, 1], [3, 3, 0, 0]])
    figures = script_.scores(script_.count_pixels(pred, label, 4))  # 14 labelled pixels; class 2 only where it is void
    iou = [6 / 10, 2 / 4, math.nan, 2 / 4]
    assert figures["class_iou"] == pytest.approx(iou, nan_ok=True)
    assert figures["class_accuracy"] == pytest.approx([1, 0.5, math.nan, 0.5], nan_ok=True)
    assert figures["miou"] == pytest.approx((0.6 + 0.5 + 0.5) / 3) and figures["accuracy"] == pytest.approx(10 / 14)
    assert figures["fw_iou"] == pytest.approx((6 * 0.6 + 4 * 0.5 + 4 * 0.5) / 14)
    assert figures["class_dice"] == pytest.approx([12 / 16, 4 / 6, math.nan, 4 / 6], nan_ok=True)
    assert figures["dice"] == pytest.approx((12 / 16 + 4 / 6 + 4 / 6) / 3)


def test_more_than_2_to_the_24_pixels_are_counted_to_the_last():
    counts = torch.tensor([[2**24 + 1, 0], [0, 1]])
    assert script_.scores(counts)["accuracy"] == 1 and script_.scores(counts)["class_iou"] == [1, 1]
    assert script_.scores(torch.tensor([[2**24, 1], [0, 0]]))["accuracy"] < 1


class Copy(torch.nn.Module):
    """A net whose class is what stands in the image's first channel."""
    def forward(self, image):
        return {"out": 9.0 * F.one_hot(image[:, 0].long(), 3).permute(0, 3, 1, 2)}


def test_images_are_judged_at_their_own_size_and_void_does_not_count():
    image = torch.zeros(1, 3, 8, 8)
    image[..., 4:] = 2
    label = torch.zeros(1, 16, 24, dtype=torch.uint8)
    label[..., 12:] = 2
    label[..., :3, :] = 255
    figures = script_.evaluate(Copy(), [(image, label, [0])], CPU, Namespace(num_classes=2, val_set="val"))
    assert figures["val_miou"] == 1 and figures["counts"] == [[156, 0, 0], [0, 0, 0], [0, 0, 156]]
    labels = torch.cat([label, torch.where(label == 2, label, 1)])  # the second image has more labelled pixels
    labels[1, :3] = 0
    batches = [(image, labels[k:k + 1], [k]) for k in (0, 1)]
    found = script_.evaluate(Copy(), batches, CPU, Namespace(num_classes=2, val_set="val"))["val_loss"]
    logits = script_.predict(Copy(), image, None, (16, 24)).expand(2, -1, -1, -1)
    assert found == pytest.approx(script_.criterion({"out": logits}, labels).item(), rel=1e-5)
    with pytest.raises(utils.InputError, match="val.txt: none of its images has a labelled pixel"):
        script_.evaluate(Copy(), [(image, torch.full_like(label, 255), [0])], CPU,
                         Namespace(num_classes=2, val_set="val"))


def test_the_rate_is_the_articles_and_never_complex_or_stuck_in_warm_up():
    def article(step, epochs, steps):
        if step <= steps:
            return 1e-3 * (1 - step / steps) + step / steps
        return (1 - (step - steps) / ((epochs - 1) * steps)) ** 0.9

    args = options("--epochs", 5, "--lr", 1)
    for step in range(35):
        assert script_.learning_rate(args, step, 7) == pytest.approx(article(step, 5, 7))
    assert [script_.learning_rate(args, step, 7) for step in (35, 36, 99)] == [0, 0, 0]
    once = [script_.learning_rate(options("--epochs", 1, "--lr", 1), step, 8) for step in range(8)]
    assert once[0] == 1e-3 and max(once) == once[4] == 1 and once[7] < 0.5
    assert script_.learning_rate(options("--epochs", 1, "--lr", 1), 0, 1) == 1


# --- Data ---

def test_image_and_label_are_scaled_flipped_and_cropped_together(scenes):
    """An image whose red channel is its label: what comes out must agree away from edges."""
    label = np.array(Image.open(voc(scenes, "SegmentationClass/s1.png")))
    label[label == 255] = 0
    save_grey(voc(scenes, "SegmentationClass/s1.png"), label)
    Image.fromarray(np.stack([label * 80] * 3, 2)).save(voc(scenes, "JPEGImages/s1.png"))
    voc(scenes, "JPEGImages/s1.jpg").unlink()
    items = script_.find_items(voc(scenes), "train")
    args = options("--num-classes", 3, "--base-size", 64, "--crop-size", 80)
    dataset = script_.VOCSegmentation(items, [], args, train=True, augment=True)
    agree, seen = [], set()
    for epoch in range(20):
        image, mask, index = dataset[epoch, 1]
        torch.rand(3)  # the global generator must not matter
        assert torch.equal(image, dataset[epoch, 1][0]) and index == 1
        assert image.shape == (3, 80, 80) and mask.shape == (80, 80) and mask.dtype == torch.uint8
        red = (image[0] * 0.229 + 0.485) * 255 / 80
        inside = mask != 255
        assert (image[:, ~inside].abs() < 0.02).all()  # what is filled in is the mean colour, void
        agree.append((red.round() == mask)[inside].float().mean().item())
        seen.add((round(inside.float().mean().item(), 3), round(mask.float().mean().item(), 3)))
    assert min(agree) > 0.9 and np.mean(agree) > 0.95 and len(seen) > 15


def test_scales_flips_and_crops_are_the_articles():
    """An image whose red and green are its columns and rows tells what was done with it."""
    image = torch.stack([*torch.meshgrid(torch.arange(64), torch.arange(64), indexing="xy"), torch.zeros(64, 64)]) * 3
    args, found = options("--base-size", 64, "--crop-size", 32), []
    for seed in range(200):
        torch.manual_seed(seed)
        crop, _ = script_.scale_flip_crop(image.byte(), torch.zeros(1, 64, 64, dtype=torch.uint8), args, augment=True)
        across, down = crop[0, 16, 26] / 3. - crop[0, 16, 6] / 3., crop[1, 26, 16] / 3. - crop[1, 6, 16] / 3.
        top = (crop[1, 16, 16] / 3 + 0.5) * 20 / down - 16.5
        found.append([20 / across.item(), 20 / down.item(), top.item()])
    across, down, top = np.array(found).T
    assert 0.48 <= down.min() < 0.56 and 1.85 < down.max() <= 2.1 and np.abs(np.abs(across) - down).max() < 0.2
    assert 70 < (across < 0).sum() < 130  # half of them mirrored, none upside down
    assert top.min() < 1 and top.max() > 60 and len({*top.round()}) > 40


@pytest.mark.parametrize("side", [33, 100])
def test_labels_are_scaled_without_a_shift_against_the_image(side):
    """On average over the places of a square; torch's "nearest" would be up to half a small pixel off."""
    args, shifts = options("--base-size", side, "--crop-size", side), []
    for start in range(5, 36):
        label = torch.zeros(1, 60, 60, dtype=torch.uint8)
        label[:, start:start + 20, start:start + 20] = 1
        pair = script_.scale_flip_crop((label * 255).expand(3, -1, -1).contiguous(), label, args, augment=False)
        centres = [(pixels[:1].double() * torch.arange(side)).sum() / pixels[:1].double().sum() for pixels in pair]
        shifts.append((centres[0] - centres[1]).item())
    assert abs(np.mean(shifts)) < 0.08


def test_the_eval_preset_makes_the_shorter_side_base_size_and_keeps_the_label(scenes):
    stripes = np.zeros((120, 180, 3), np.uint8)
    stripes[:, ::2] = 255  # become grey as they shrink, not black and white
    Image.fromarray(stripes).save(voc(scenes, "JPEGImages/s8.png"))
    voc(scenes, "JPEGImages/s8.jpg").unlink()
    save_grey(voc(scenes, "SegmentationClass/s8.png"), np.ones((120, 180), np.uint8))
    dataset = script_.VOCSegmentation(script_.find_items(voc(scenes), "val"), [], options("--base-size", 40), False,
                                      False)
    image, label, _ = dataset[0, 0]
    assert image.shape == (3, 40, 60) and label.shape == (120, 180) and image.std() < 0.5


def test_lists_with_crlf_blank_lines_and_two_columns(scenes):
    voc(scenes, "ImageSets/Segmentation/odd.txt").write_bytes(b"\xef\xbb\xbfs1  1\r\n\r\n s4 -1\r\n  \r\ns2\r\n")
    items = script_.find_items(voc(scenes), "odd")
    assert [item[0] for item in items] == ["s1", "s4", "s2"]
    assert items[0][1].name == "s1.jpg" and items[0][2].name == "s1.png"


def test_voc_root_is_found_from_its_parent_and_in_itself(scenes):
    assert script_.find_root(scenes, "2012") == script_.find_root(scenes / "VOCdevkit", "2012") == voc(scenes)


def test_the_years_that_are_there_are_named(scenes):
    with pytest.raises(utils.InputError, match="holds neither VOCdevkit/VOC2007 nor VOC2007; give --year 2012$"):
        script_.find_root(scenes, "2007")
    (scenes / "VOCdevkit/VOC2010").mkdir()
    with pytest.raises(utils.InputError, match="give --year 2010 or 2012$"):
        script_.find_root(scenes, "2007")


def test_ids_with_spaces_at_their_ends_and_overfitting_without_a_list_to_validate_on(scenes, tmp_path):
    root = voc(scenes)
    for folder, ending in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
        (root / folder / f"s1.{ending}").rename(root / folder / f" s1 .{ending}")
    (root / "ImageSets/Segmentation/train.txt").write_text(" s1 \ns2 \n s3\n")
    assert [item[0] for item in script_.find_items(root, "train")] == [" s1 ", "s2", "s3"]
    (root / "ImageSets/Segmentation/val.txt").unlink()
    assert train(scenes, tmp_path / "run", "--epochs", 1, "--overfit", 2)["val_loss"] > 0


def test_class_names(scenes):
    assert script_.find_classes(voc(scenes), 2) == ["0", "1", "2"]
    assert script_.find_classes(voc(scenes), 20)[15] == "person"
    (scenes / "class_names.json").write_text('{"disc": 1, "triangle": 3, "void": 255}')
    assert script_.find_classes(voc(scenes), 3) == ["background", "disc", "2", "triangle"]
    with pytest.raises(utils.InputError, match="class_names.json: names class 3, but --num-classes is 2"):
        script_.find_classes(voc(scenes), 2)
    for text in ("[1]", '{"disc": Infinity}', '{"disc": 1.5}', '{"disc": 1, "square": 1}', "[" * 60000):
        (scenes / "class_names.json").write_text(text)
        with pytest.raises(utils.InputError, match="class_names.json: not like"):
            script_.find_classes(voc(scenes), 3)


def test_palette_grey_and_16_bit_masks_read_alike(scenes):
    path = voc(scenes, "SegmentationClass/s0.png")
    label = np.array(Image.open(path))
    assert set(np.unique(label)) > {0, 255}
    item = ("s0", voc(scenes, "JPEGImages/s0.jpg"), path)
    utils.save_mask(path, label)
    assert Image.open(path).mode == "P" and np.array_equal(script_.read_item(item, 3)[1], label)
    save_grey(path, label.astype(np.uint16))
    assert np.array_equal(script_.read_item(item, 3)[1], label)


# --- Training ---

def test_the_loss_falls_and_every_file_is_written(scenes, tmp_path, capsys):
    figures = train(scenes, tmp_path / "run", "--epochs", 12, "--overfit", 8, "-b", 8, "--lr", 0.1)
    rows = [line.split(",") for line in (tmp_path / "run/log.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
    assert losses[-1] < 0.75 * losses[0]
    for name in ("last.pth", "best.pth", "log.csv", "curves.png", "val_samples.png", "args.json", "record_mAP.txt"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    printed = capsys.readouterr().out
    assert "parameters trained" in printed and "best val_miou" in printed
    record = (tmp_path / "run/record_mAP.txt").read_text()
    assert record.partition("\n\n")[0] in printed and "rows: truth" in record
    matrix = [list(map(int, line.split())) for line in record.splitlines()[-4:]]
    assert matrix == figures["counts"]
    tested = train(scenes, tmp_path / "other", "--overfit", 8, "--test-only", "--resume", tmp_path / "run/last.pth")
    assert str(tested) == str({key: figures[key] for key in tested})
    assert (tmp_path / "other/record_mAP_test.txt").read_text().splitlines()[1:] == record.splitlines()[1:]


def test_results_txt_is_the_articles_an_entry_an_epoch_even_when_resumed(scenes, tmp_path):
    train(scenes, tmp_path / "run", "--epochs", 2)
    first = next((tmp_path / "run").glob("results*.txt")).read_text()
    assert first.splitlines()[0] == "[epoch: 0]" and first.splitlines()[8] == "[epoch: 1]"
    words = [line.split(":")[0] for line in first.splitlines()[:8]]
    assert words == ["[epoch", "train_loss", "lr", "global correct", "average row correct", "IoU", "mean IoU", ""]
    assert len(json.loads(first.splitlines()[5].split(": ")[1].replace("'", '"'))) == 4
    figures = train(scenes, tmp_path / "run", "--epochs", 3, "--resume", "auto")
    (path,) = (tmp_path / "run").glob("results*.txt")
    entries = path.read_text().split("\n\n")
    assert len(entries) == 4 and entries[2].startswith("[epoch: 2]") and path.read_text().startswith(first)
    assert entries[2].splitlines()[6] == f"mean IoU: {100 * figures['val_miou']:.1f}"
    assert entries[2].splitlines()[3] == f"global correct: {100 * figures['val_accuracy']:.1f}"
    lines = script_.table("", {**figures, "class_iou": [0.5], "class_dice": [0.6], "class_accuracy": [0.7]}, ["cat"])
    assert lines.splitlines()[-1].split()[:4] == ["cat", "50.00", "60.00", "70.00"]


@pytest.mark.parametrize("more", [
    ["--aux", "False"], ["--accumulate", "2", "-b", "2"], ["--amp", "bf16"], ["--freeze", "backbone"],
    ["--sync_bn", "True"], ["--limit", "3"], ["-b", "3"], ["-b", "64"],
    ["--backbone", "resnet50", "-b", "2", "--limit", "2"]])
def test_every_option_trains(scenes, tmp_path, more):
    figures = train(scenes, tmp_path / "run", "--epochs", 1, *more)
    assert math.isfinite(figures["val_loss"])
    model = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    assert all(p.isfinite().all() for p in model.values())
    assert any(key.startswith("aux_classifier.") for key in model) == ("--aux" not in more)


class Tiny(torch.nn.Module):
    """A net without batch norm and dropout, made of the parts that the script asks for."""
    def __init__(self, backbone, num_classes, aux):
        super().__init__()
        self.backbone, self.aux_classifier = torch.nn.Conv2d(3, 4, 3, padding=1), None
        self.classifier = torch.nn.Conv2d(4, num_classes, 1)

    def forward(self, image):
        return {"out": self.classifier(self.backbone(image).relu())}


def test_the_gradient_is_the_mean_over_labelled_pixels_however_they_lie_in_batches(scenes, tmp_path, monkeypatch):
    """Images of little and of much void; the last step is smaller. Equal weights in each batch would be seen."""
    monkeypatch.setattr(script_, "deeplabv3", Tiny)
    for index in (0, 3, 5):
        path = voc(scenes, f"SegmentationClass/s{index}.png")
        label = np.array(Image.open(path))
        label[3:] = 255
        save_grey(path, label)
    for name, more in (("a", ["-b", 6]), ("b", ["-b", 3, "--accumulate", 2]), ("c", ["-b", 2, "--accumulate", 3])):
        train(scenes, tmp_path / name, "--epochs", 2, "--lr", 0.1, "--aux", "False", *more)
    a, b, c = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "abc")
    for key in a:
        assert torch.allclose(a[key], b[key], atol=1e-6) and torch.allclose(a[key], c[key], atol=1e-6)
    losses = [(tmp_path / name / "log.csv").read_text().splitlines()[2].split(",")[3] for name in "abc"]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5) == pytest.approx(float(losses[2]), rel=1e-5)


def test_a_frozen_backbone_keeps_weights_and_statistics(scenes, tmp_path):
    train(scenes, tmp_path / "a", "--epochs", 1)
    train(scenes, tmp_path / "b", "--epochs", 1, "--lr", 0.1, "--freeze", "backbone",
          "--weights", tmp_path / "a/last.pth")
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "ab")
    same = {key for key in a if torch.equal(a[key], b[key])}
    assert {key for key in a if key.startswith("backbone.")} <= same and "classifier.4.weight" not in same


def test_the_auxiliary_head_learns_ten_times_as_fast(scenes, tmp_path):
    train(scenes, tmp_path / "run", "--epochs", 1)
    groups = torch.load(tmp_path / "run/last.pth", weights_only=True)["optimizer"]["param_groups"]
    assert len(groups) == 2 and groups[1]["lr"] == pytest.approx(10 * groups[0]["lr"])
    train(scenes, tmp_path / "more", "--epochs", 1, "--limit", 2, "--wd", 0.25, "--momentum", 0.5)
    groups = torch.load(tmp_path / "more/last.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["momentum"]) for group in groups] == [(0.25, 0.5)] * 2


@pytest.mark.parametrize("batch, counted", [(3, 8), (7, 7), (2, 8)])
def test_a_lone_last_image_is_left_out_another_each_epoch_and_it_is_said(scenes, tmp_path, capsys, batch, counted):
    args = options("--data-path", scenes, *SMALL, "-b", batch)
    loader = script_.create_loaders(args)[0]
    left_out = set()
    for epoch in range(12):
        loader.sampler.set_epoch(epoch)
        seen = [index for _, index in loader.sampler]
        assert len(seen) == counted == len(set(seen))
        left_out |= set(range(8)) - set(seen)
    assert (len(left_out) > 2) == (counted < 8)
    assert ("1 of 8 training images are left out of each epoch" in capsys.readouterr().out) == (counted < 8)


def test_ranks_see_disjoint_images_as_many_each_and_validation_has_no_duplicates(scenes, monkeypatch):
    args = options("--data-path", scenes, *SMALL, "-b", 2, "--limit", 7)
    loaders = []
    for rank in (0, 1):
        monkeypatch.setattr(utils, "ranks", lambda: (rank, 2))
        loaders.append(script_.create_loaders(args))
    for epoch in range(3):
        parts = []
        for train_loader, _ in loaders:
            train_loader.sampler.set_epoch(epoch)
            parts.append([index for _, index in train_loader.sampler])
        assert len(parts[0]) == len(parts[1]) == 2 and not set(parts[0]) & set(parts[1])
    assert sorted(index for _, loader in loaders for _, index in loader.sampler) == [0, 1]


def test_the_articles_command_lines_run(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--backbone mobilenet_v3_large --weights none --base-size 48 --crop-size 48 -j 0".split()
    script_.main(options(*small, *f"""--data-path {scenes} --num-classes 3 --aux False --device cpu -b 4 --epochs 1
        --lr 0.0001 --momentum 0.9 --wd 1e-4 --print-freq 10 --start-epoch 0 --amp False""".split(), "--resume", ""))
    script_.main(options(*small, *f"""--data-path {scenes} --num-classes 3 --aux True --device cpu -b 4 --epochs 1
        --sync_bn False --output-dir ./multi_train --test-only --weights runs/train_deeplabv3/last.pth --world-size 1
        --dist-url env:// --start_epoch 0 --aux False""".split()))
    printed = capsys.readouterr().out
    assert "note: --print-freq: no effect" in printed and "torchrun" in printed


def test_sanity_check_prints_counts_and_draws_a_panel(scenes, tmp_path, capsys):
    train(scenes, tmp_path / "run", "--sanity-check", "-b", 1)
    printed = capsys.readouterr().out
    assert "baselines that ignore the image: val_miou" in printed and "images have no class but 0" in printed
    assert "train: 8 images, 8 of 64x64" in printed and "255 void:" in printed and "in 8 images" in printed
    assert (tmp_path / "run/sanity_check.png").exists() and not (tmp_path / "run/last.pth").exists()


def test_the_sanity_check_shows_what_is_trained_in_the_image_s_own_colours(scenes, tmp_path, monkeypatch):
    """Without augmentation and at the image's size it is the image, as normalisation is undone."""
    panels = []
    monkeypatch.setattr(utils, "save_panel", lambda path, rows, titles, legend: panels.append(rows))
    train(scenes, tmp_path / "run", "--sanity-check", "--overfit", 4, "--base-size", 64, "--crop-size", 64)
    for _, label, trained in panels[0].values():
        assert np.abs(label.astype(int) - trained).max() <= 1


# --- Weights ---

def official(path, num_classes=21, aux=True, wrap=lambda state: state):
    """A file as torchvision publishes them, of a net with fresh weights."""
    import torchvision
    torch.manual_seed(5)
    net = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None,
                                                                       num_classes=num_classes, aux_loss=aux)
    torch.save(wrap(net.state_dict()), path)
    return net.state_dict()


def created(path, *more):
    return script_.create_model(options(*SMALL, *MOBILENET, "--weights", path, *more))[0].state_dict()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3},
                                  lambda s: {f"module.{key}": value for key, value in s.items()}])
def test_official_files_load_and_only_the_last_layers_of_other_classes_start_fresh(tmp_path, capsys, wrap):
    theirs = official(tmp_path / "coco.pth", wrap=wrap)
    ours = created(tmp_path / "coco.pth", "--num-classes", 20)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs) and not capsys.readouterr().out
    ours = created(tmp_path / "coco.pth", "--num-classes", 3)
    fresh = [key for key in ours if ours[key].shape != theirs[key].shape]
    assert fresh == ["classifier.4.weight", "classifier.4.bias", "aux_classifier.4.weight", "aux_classifier.4.bias"]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in fresh)
    assert f"coco.pth: {', '.join(fresh)} start fresh" in capsys.readouterr().out


def test_auxiliary_heads_that_only_one_side_has(tmp_path, capsys):
    official(tmp_path / "with.pth")
    assert not any("aux" in key for key in created(tmp_path / "with.pth", "--num-classes", 20, "--aux", "False"))
    assert not capsys.readouterr().out
    official(tmp_path / "without.pth", aux=False)
    created(tmp_path / "without.pth", "--num-classes", 20)
    assert "without.pth: aux_classifier.0.weight" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [lambda s: s.pop("classifier.1.weight"), lambda s: s.update(extra=torch.zeros(1)),
                                   lambda s: s.update({"classifier.4.weight": torch.zeros(21, 99, 1, 1)}),
                                   lambda s: s.pop("classifier.4.bias"), lambda s: s.pop("aux_classifier.1.weight"),
                                   lambda s: s.update({"backbone.0.0.weight": torch.zeros(1)})])
def test_anything_else_missing_or_unexpected_is_an_error(tmp_path, spoil):
    def wrap(state):
        spoil(state)
        return state
    official(tmp_path / "x.pth", wrap=wrap)
    words = "x.pth: weights of another net than DeepLabV3: (1 of 360 .* 0|0 of 360 .* 1) unknown"
    with pytest.raises(utils.InputError, match=words):
        created(tmp_path / "x.pth")


def test_fresh_layers_are_never_tested(scenes, tmp_path):
    official(tmp_path / "coco.pth")
    refuses(scenes, "coco.pth: has no trained classifier.4.weight",
            more=[*MOBILENET, "--test-only", "--weights", tmp_path / "coco.pth"])


def test_coco_weights_are_fetched_once_by_hash_or_the_url_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(url, path, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(utils.InputError) as caught:
        created("coco")
    url = "https://download.pytorch.org/models/deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    path = tmp_path / "hub/checkpoints/deeplabv3_mobilenet_v3_large-fc3c493d.pth"
    assert url in str(caught.value) and str(path) in str(caught.value)
    official(path)
    with pytest.raises(utils.InputError, match="instead of any, fc3c493d; delete it and run again"):
        created("coco")


# --- Bad input ---

def test_missing_folders(scenes, tmp_path):
    refuses(tmp_path / "nowhere", "nowhere: holds neither VOCdevkit/VOC2012 nor VOC2012", "--data-path", "--year")
    refuses(scenes, "VOC2007", more=["--year", 2007])
    with pytest.raises(utils.InputError, match="--data-path.*--demo"):
        script_.main(options(*SMALL))


def test_lists_that_are_missing_empty_or_name_what_is_not_there(scenes):
    refuses(scenes, "ImageSets/Segmentation/other.txt: no such list", more=["--val-set", "other"])
    path = voc(scenes, "ImageSets/Segmentation/val.txt")
    path.write_text("\n \n")
    refuses(scenes, "val.txt: lists nothing")
    path.write_text("s8\nghost\n")
    refuses(scenes, "JPEGImages/ghost: no such image", "val.txt")
    Image.new("RGB", (8, 8)).save(voc(scenes, "JPEGImages/ghost.jpg"))
    refuses(scenes, "SegmentationClass/ghost: no such image", "val.txt")


def test_a_test_needs_no_training_images(scenes, tmp_path):
    figures = train(scenes, tmp_path / "run", "--epochs", 1)
    voc(scenes, "ImageSets/Segmentation/train.txt").unlink()
    tested = train(scenes, tmp_path / "x", "--test-only", "--resume", tmp_path / "run/last.pth")
    assert str(tested) == str({key: figures[key] for key in tested})
    assert train(scenes, tmp_path / "y", "--test-only", "--sanity-check")["train"] == 0
    assert not (tmp_path / "x/record_mAP.txt").exists() and (tmp_path / "x/record_mAP_test.txt").exists()


def test_lossy_labels_are_refused(scenes):
    voc(scenes, "SegmentationClass/s9.png").unlink()
    Image.fromarray(np.full((64, 64), 2, np.uint8)).save(voc(scenes, "SegmentationClass/s9.jpg"))
    refuses(scenes, "SegmentationClass/s9.jpg: JPEG can change ids near edges")


def test_two_images_of_one_name(scenes):
    Image.new("RGB", (64, 64)).save(voc(scenes, "JPEGImages/s3.png"))
    refuses(scenes, "JPEGImages/s3.png: s3.jpg has the same name")


def test_a_label_outside_the_classes_names_file_and_value(scenes):
    label = np.zeros((64, 64), np.uint8)
    label[5, 5] = 7
    save_grey(voc(scenes, "SegmentationClass/s9.png"), label)
    refuses(scenes, "SegmentationClass/s9.png: label 7 is outside 0..3", "--num-classes")


def test_colour_coded_masks(scenes):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(voc(scenes, "SegmentationClass/s2.png"))
    refuses(scenes, "SegmentationClass/s2.png: colour-coded")


def test_masks_of_0_and_255_only(scenes):
    for path in voc(scenes, "SegmentationClass").iterdir():
        save_grey(path, np.eye(64, dtype=np.uint8) * 255)
    refuses(scenes, "SegmentationClass: none of 8 masks has a label between 1 and 3", "255 means void")


def test_sizes_that_differ_name_both_files_and_sizes(scenes):
    save_grey(voc(scenes, "SegmentationClass/s2.png"), np.zeros((64, 60), np.uint8))
    refuses(scenes, "SegmentationClass/s2.png: 60x64", "JPEGImages/s2.jpg has 64x64")


@pytest.mark.parametrize("kind", ["JPEGImages/s3.jpg", "SegmentationClass/s3.png"])
def test_truncated_and_foreign_files(scenes, kind):
    path = voc(scenes, kind)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) * 2 // 3])
    refuses(scenes, path, "truncated or unreadable")
    path.write_bytes(b"no image")
    refuses(scenes, path, "not an image")


@pytest.mark.parametrize("more, words", [
    (["-b", "1"], ["--batch-size 1", "variance", "give 2"]),
    (["--limit", "1"], ["1 training images for 1 processes"]),
    (["--overfit", "1"], ["1 training images"]), (["--device", "cuda:7"], ["--device cuda:7", "not on this machine"]),
    (["--amp", "fp16"], ["--amp fp16", "CUDA"]), (["--weights", "none.pth"], ["none.pth", "no such file"]),
    (["--resume", "none.pth"], ["none.pth", "no such file"]),
    (["--test-only"], ["--test-only", "--weights or --resume"])])
def test_options_that_cannot_be(scenes, more, words):
    refuses(scenes, *words, more=more)


def test_a_checkpoint_of_another_net_or_other_classes_names_both(scenes, tmp_path):
    train(scenes, tmp_path / "a", "--epochs", 1)
    refuses(scenes, "num_classes 4; asked for num_classes 5",
            more=["--num-classes", 4, "--resume", tmp_path / "a/last.pth"])
    for option, name in (("--weights", "best.pth"), ("--resume", "last.pth")):
        refuses(scenes, "backbone demo; asked for backbone resnet50",
                more=["--backbone", "resnet50", option, tmp_path / "a" / name])


def test_ones_own_checkpoint_of_other_classes_starts_all_but_the_last_layers(scenes, tmp_path, capsys):
    train(scenes, tmp_path / "a", "--epochs", 1)
    weights = ["--num-classes", 4, "--weights", tmp_path / "a/best.pth"]
    figures = train(scenes, tmp_path / "b", "--epochs", 1, *weights)
    printed = capsys.readouterr().out
    assert "trained with num_classes 4, now 5" in printed and "classifier.4.weight" in printed
    assert len(figures["class_iou"]) == 5
    refuses(scenes, "num_classes 4; asked for num_classes 5", more=["--test-only", *weights])


def test_testing_at_another_size_is_refused_and_on_other_images_said(scenes, tmp_path, capsys):
    train(scenes, tmp_path / "run", "--epochs", 1)
    weights = ["--test-only", "--weights", tmp_path / "run/best.pth"]
    capsys.readouterr()
    train(scenes, tmp_path / "x", *weights)
    assert "some may have been trained on" not in capsys.readouterr().out
    train(scenes, tmp_path / "x", *weights, "--limit", 1)
    assert "some may have been trained on" in capsys.readouterr().out
    refuses(scenes, "--base-size 64: trained with 48", more=[*weights, "--base-size", 64])


def test_baselines_that_ignore_the_image(scenes):
    for number, name in enumerate("abc"):  # the left half of every image is 0, the right 1; in one of three all is 0
        label = np.zeros((40, 40), np.uint8)
        label[:, 20:] = number > 0
        save_grey(voc(scenes, f"SegmentationClass/{name}.png"), label)
        Image.new("RGB", (40, 40)).save(voc(scenes, f"JPEGImages/{name}.png"))
    voc(scenes, "ImageSets/Segmentation/three.txt").write_text("a\nb\nc\n")
    items = script_.find_items(voc(scenes), "three")
    commonest, by_place = script_.naive_scores(items, items, 3)
    assert commonest == pytest.approx(((4 / 6) + 0) / 2)                 # 4 of 6 halves are 0
    assert by_place == pytest.approx((3 / 4 + 2 / 3) / 2)                # the right half of a is wrong


def test_images_in_both_lists_are_said(scenes, capsys):
    script_.create_loaders(options("--data-path", scenes, *SMALL, "--val-set", "train"))
    assert "note: 8 of 8 validation images are trained on too" in capsys.readouterr().out


def test_real_folders_pass_the_sanity_check(real_data, tmp_path, capsys):
    train(real_data / "camvid_voc", tmp_path / "run", "--sanity-check", "--num-classes", 10, "--limit", 60)
    printed = capsys.readouterr().out
    assert "train: 60 images, 60 of 480x360" in printed and "3 road:" in printed
    train(real_data / "voc2007_sample", tmp_path / "run", "--sanity-check", "--num-classes", 20, "--year", 2007)
    assert "train: 2 images" in capsys.readouterr().out


def test_each_step_has_the_rate_of_that_step(scenes, tmp_path, monkeypatch):
    used, finish = [], utils.Run.finish_gradient
    monkeypatch.setattr(utils.Run, "finish_gradient", lambda run, optimizer, *args: used.append(
        optimizer.param_groups[0]["lr"]) or finish(run, optimizer, *args))
    train(scenes, tmp_path / "run", "--epochs", 3, "--lr", 0.1)
    args = options("--epochs", 3, "--lr", 0.1)
    assert len(used) == 6 and used == [script_.learning_rate(args, step, 2) for step in range(6)]
