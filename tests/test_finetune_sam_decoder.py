"""finetune_sam_decoder.py: prompts, loss and figures on hand-worked masks, void, embeddings on disk, training."""
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune_sam_decoder as script_
import utils
from nets import sam
from conftest import save_grey

SMALL = ["--year", "2012", "--model", "demo", "--weights", "none", "--image-size", "64", "-b", "2", "-j", "0",
         "--device", "cpu", "--lr", "0.001", "--epochs", "1"]


@pytest.fixture
def instances(tmp_path):
    """Folder with a VOCdevkit of ten 64x64 images of two objects or more, eight to train on."""
    import demo_data
    demo_data.write_instances(tmp_path / "voc", 10, rings=True, size=64)
    return tmp_path / "voc"


def options(*texts):
    return script_.get_args_parser().parse_args([str(text) for text in texts])


def train(folder, output, *more):
    return script_.main(options("--data-path", folder, "--output-dir", output, *SMALL, *more))


def voc(folder, *parts):
    return folder.joinpath("VOCdevkit/VOC2012", *parts)


def refuses(folder, *expected, more=()):
    output = folder.parent / "refused"
    with pytest.raises(utils.InputError) as caught:
        train(folder, output, *more)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message
    assert not (output / "best.pth").exists()


# --- Prompts ---

def ids_by_hand():
    """20x30: object 1 in rows 4 to 10, columns 6 to 20, with void around it and right of it; object 2 a corner."""
    ids = np.zeros((20, 30), np.int64)
    ids[3:12, 5:22] = -1
    ids[4:11, 6:21] = 1
    ids[:, 22:] = -1
    ids[18:, :4] = 2
    return ids


def test_prompts_lie_on_and_beside_the_object_and_never_on_void():
    ids, args = ids_by_hand(), options("--points", 4, "--bbox-shift", 0)
    for seed in range(40):
        torch.manual_seed(seed)
        points, labels, boxes, _ = script_.sample_prompts(ids, [1, 2], args, vary=True)
        assert labels.tolist() == [[1, 1, 1, 1, 0, 0]] * 2  # two to one
        for query, number in zip(points.int().tolist(), (1, 2)):
            found = [ids[y, x] for x, y in query]
            assert found[:4] == [number] * 4 and all(value >= 0 and value != number for value in found[4:])
    assert boxes.tolist() == [[6, 4, 20, 10], [0, 18, 3, 19]]
    assert script_.sample_prompts(ids, [1], options(), False)[0].shape == (1, 2, 2)  # the article: one and one
    full = np.ones((4, 4), np.int64)
    assert script_.sample_prompts(full, [1], options(), False)[1].tolist() == [[1, -1]]  # nothing beside it


def test_boxes_move_both_ways_and_half_of_a_small_one_stays():
    ids, args = ids_by_hand(), options("--bbox-shift", 200)
    seen = set()
    for seed in range(100):
        torch.manual_seed(seed)
        x0, y0, x1, y1 = script_.sample_prompts(ids, [1], args, vary=True)[2][0].tolist()
        assert 0 <= x0 and x1 <= 29 and 0 <= y0 and y1 <= 19 and x1 - x0 >= 7 and y1 - y0 >= 3
        seen.add("in" if x0 > 6 else "out")
    assert seen == {"in", "out"}
    boxes = torch.stack([script_.sample_prompts(ids, [1], options("--bbox-shift", 12), True)[2][0] for _ in range(200)])
    assert 1.2 < (boxes[:, 0] - 6).abs().max() <= 12 * 30 / 256  # of an image of 256 pixels


def test_either_kind_of_prompt_is_left_out_as_often():
    """The article: 12.6 % without clicks, 9.4 % without a box. Here one in four each."""
    ids, args = ids_by_hand(), options()
    torch.manual_seed(0)
    kinds = torch.stack([script_.sample_prompts(ids, [1], args, vary=True)[3][0] for _ in range(2000)])
    shares = torch.bincount(kinds, minlength=3) / 2000
    assert shares.tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.04)
    for more, kind in ((["--box-prompt", "False"], script_.POINTS), (["--point_prompt", "False"], script_.BOX)):
        assert script_.sample_prompts(ids, [1, 2], options(*more), True)[3].tolist() == [kind] * 2
    assert script_.sample_prompts(ids, [1], args, False)[3].tolist() == [script_.BOTH]


def test_masks_are_the_share_of_each_cell_without_void_and_padding():
    """A 16x32 image at 32 pixels: cells of 4x4 pixels, four rows of eight; four rows are padding."""
    ids = np.zeros((16, 32), np.int64)
    ids[:8, :8] = 1
    ids[4:8, 4:6] = -1   # half of the second cell of the second row is void, the other half object
    ids[12:, 28:] = -1
    masks, weight = script_.cover(torch.from_numpy(ids), torch.tensor([1]), SimpleNamespace(image_size=32))
    assert masks.shape == (1, 8, 8) and weight.shape == (8, 8)
    inner = v2_share(ids == 1), v2_share(ids >= 0)
    assert torch.allclose(weight[:4], inner[1], atol=1e-6) and not weight[4:].any()
    assert torch.allclose(masks[0, :4] * weight[:4], inner[0], atol=1e-6) and weight[3, 7] < 0.5
    whole = np.ones((16, 32), np.int64)
    masks, _ = script_.cover(torch.from_numpy(whole), torch.tensor([1]), SimpleNamespace(image_size=32))
    assert masks[0, :4].min() == 1 and not masks[0, 4:].any()


def v2_share(mask):
    return torch.from_numpy(mask).float().reshape(4, 4, 8, 4).mean((1, 3))


def test_image_and_masks_are_mirrored_together(instances):
    args = options("--data-path", instances, *SMALL, "--flip", "--no-cache", "--points", 8, "--bbox-shift", 0)
    dataset = script_.create_loaders(args)[0].dataset
    plain = script_.read_input(dataset.items[0], False, args)
    seen = set()
    for epoch in range(12):
        image, points, labels, boxes, _, masks, weight, _ = dataset[epoch, 0]
        mirrored = not torch.equal(image, plain)
        seen.add(mirrored)
        assert torch.equal(image.flip(2) if mirrored else image, plain)
        for query, label, box, mask in zip(points, labels, boxes, masks):
            x, y = (query[label == 1] / 4).int().T
            assert (mask[y, x] > 0).all()  # clicks hit the mask as it lies now
            rows, columns = (mask >= 0.5).nonzero().T
            assert box[0] / 4 == pytest.approx(columns.min(), abs=1.5)
            assert box[3] / 4 == pytest.approx(rows.max(), abs=1.5)
    assert seen == {True, False}


def test_clicks_and_boxes_hit_the_mask_of_an_image_that_is_resized(instances):
    """50x90 pixels seen at 128: clicks on the object lie where the net's square shows it, the padding apart."""
    utils.save_image(voc(instances, "JPEGImages/blob_0000.jpg"), np.full((50, 90, 3), 90, np.uint8))
    ids = np.zeros((50, 90), np.uint8)
    ids[30:45, 60:80] = 3
    save_grey(voc(instances, "SegmentationObject/blob_0000.png"), ids)
    (item,) = [item for item in script_.find_items(voc(instances), "val", options()) if item[0] == "blob_0000"]
    dataset = script_.VOCObjects([item], {}, options(*SMALL, "--image-size", 128, "--bbox-shift", 0), True, True)
    for epoch in range(5):
        image, points, labels, boxes, _, masks, weight, _ = dataset[epoch, 0]
        x, y = (points[0][labels[0] == 1] / 4).int().T
        assert (masks[0][y, x] > 0.2).all() and not weight[18:].any() and not image[:, 72:].any()
        assert boxes[0].tolist() == pytest.approx([60 * 128 / 90, 30 * 71 / 50, 79 * 128 / 90, 44 * 71 / 50])


def test_images_are_prepared_as_the_official_class_prepares_them(instances):
    item = script_.find_items(voc(instances), "train", options())[0]
    model = script_.NETS["demo"](64)
    theirs = model.preprocess(torch.from_numpy(utils.read_image(item[1]).transpose(2, 0, 1).copy()).float())
    torch.testing.assert_close(script_.read_input(item, False, options(*SMALL)), theirs, atol=1e-5, rtol=1e-5)
    stripes = (torch.arange(60) % 2 * 255).byte().expand(3, 40, 60)  # become grey as they shrink, as by PIL
    shrunk = sam.preprocess(stripes, 20)
    assert shrunk.shape == (3, 20, 20) and shrunk[:, :13].std((1, 2)).max() < 0.5 and not shrunk[:, 13:].any()


@pytest.mark.parametrize("shape, side, least", [((50, 64), 64, 0.95), ((170, 256), 256, 0.99)])
def test_a_mask_sent_through_the_nets_postprocessing_is_itself(shape, side, least):
    """Targets lie where the decoder's masks do: not stretched to whole cells."""
    ids = torch.zeros(shape, dtype=torch.long)
    ids[-20:-4, 10:-10] = 1
    masks, _ = script_.cover(ids, torch.tensor([1]), SimpleNamespace(image_size=side))
    model = script_.NETS["demo"](side)
    back = model.postprocess_masks(masks[None] - 0.5, script_.resized_size(*shape, side), shape)[0] > 0
    assert script_.mask_iou(back, ids[None] == 1, ids >= 0).item() > least


def test_the_smallest_object_is_a_target_that_can_be_hit():
    ids = torch.zeros(256, 256, dtype=torch.long)
    ids[100:102, 50:52] = 1
    masks, weight = script_.cover(ids, torch.tensor([1]), SimpleNamespace(image_size=64))
    assert masks.max() == 1
    exact = masks[None] >= 0.5
    assert script_.soft_iou(exact, masks[None], weight[None, None]).item() == 1


# --- Loss and figures ---

def test_loss_of_hand_worked_masks():
    masks, weight = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    masks[0, :2] = 1
    logits = torch.full((1, 3, 4, 4), -20.0)
    logits[0, 0, :2] = logits[0, 1, :1] = 20.0     # exact; half of it; everything
    logits[0, 2] = 20.0
    iou = torch.tensor([[1.0, 0.5, 0.5]])
    assert script_.soft_iou(logits > 0, masks[:, None], weight[:, None]).tolist() == iou.tolist()
    assert script_.criterion(logits, iou, masks, weight).item() == pytest.approx(0, abs=1e-5)  # the best of three
    half = script_.criterion(logits[:, 1:2], iou[:, 1:2], masks, weight).item()
    assert half == pytest.approx(20 * 4 / 16 + 1 - 2 * 4 / 12, rel=1e-5)
    assert script_.criterion(logits[:, 1:2], iou[:, :1], masks, weight).item() == pytest.approx(half + 0.25, rel=1e-5)


def test_a_logit_that_is_surely_wrong_has_a_gradient():
    """The article's sigmoid and BCELoss give none at +20 and -110."""
    logits = torch.tensor([20.0, -110.0]).reshape(1, 1, 1, 2).requires_grad_()
    loss = script_.criterion(logits, torch.zeros(1, 1), torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 1, 2))
    loss.sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([0.5, -0.5], abs=0.01)


def test_each_object_has_its_own_best_mask():
    masks = torch.zeros(2, 4, 4)
    masks[0, :2], masks[1, :, 2:] = 1, 1
    logits = torch.full((2, 3, 4, 4), -20.0)
    logits[0, 0, :2], logits[1, 2, :, 2:] = 20.0, 20.0
    losses = script_.criterion(logits, script_.soft_iou(logits > 0, masks[:, None], torch.ones(2, 1, 4, 4)), masks,
                               torch.ones(2, 4, 4))
    assert losses.tolist() == pytest.approx([0, 0], abs=1e-5)


def test_what_is_under_void_changes_neither_loss_nor_figure():
    torch.manual_seed(0)
    logits, iou = torch.randn(2, 3, 8, 8), torch.rand(2, 3)
    masks, weight = (torch.rand(2, 8, 8) > 0.5).float(), torch.ones(2, 8, 8)
    weight[:, 2:5, 3:] = 0
    other_logits, other_masks = logits.clone(), masks.clone()
    other_logits[:, :, 2:5, 3:] *= -7
    other_masks[:, 2:5, 3:] = 1 - masks[:, 2:5, 3:]
    assert torch.equal(script_.criterion(logits, iou, masks, weight),
                       script_.criterion(other_logits, iou, other_masks, weight))
    pred, truth, labelled = torch.rand(3, 20, 20) > 0.5, torch.rand(3, 20, 20) > 0.5, torch.ones(20, 20).bool()
    labelled[5:9] = False
    truth &= labelled
    other = pred.clone()
    other[:, 5:9] ^= True
    assert torch.equal(script_.mask_iou(pred, truth, labelled), script_.mask_iou(other, truth, labelled))
    for a, b, t in zip(pred, other, truth):
        first, second = (script_.next_click(mask, t, labelled) for mask in (a, b))
        assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_predictions_under_void_change_no_boundary():
    """As VOC has void around every object: it counts neither as wrong nor as the edge's place."""
    truth, labelled = torch.zeros(1, 60, 60).bool(), torch.ones(60, 60).bool()
    labelled[16:44, 16:44], truth[0, 20:40, 20:40] = False, True
    labelled[20:40, 20:40] = True
    for pixels in range(4):
        pred = torch.zeros_like(truth)
        pred[0, 20 - pixels:40 + pixels, 20 - pixels:40 + pixels] = True
        assert script_.boundary_iou(pred, truth, labelled).item() == 1


def test_labels_under_void_change_nothing_that_is_trained_or_measured(instances, tmp_path):
    figures = train(instances, tmp_path / "a", "--cache-dir", tmp_path / "cache")
    for path in voc(instances, "SegmentationClass").iterdir():
        label = np.array(utils.Image.open(path))
        label[label == 255] = 7
        save_grey(path, label)
    again = train(instances, tmp_path / "b", "--cache-dir", tmp_path / "cache")
    assert again == figures


def test_clicks_go_to_the_middle_of_the_largest_wrong_region():
    truth, pred, labelled = torch.zeros(3, 20, 30).bool()
    labelled[:] = True
    truth[4:11, 6:21] = True
    assert script_.middle(truth).tolist()[1] == 7 and 9 <= script_.middle(truth)[0] <= 17
    pred[4:11, 6:16] = True                       # 7x5 pixels of the object are missing
    pred[15:18, 0:3] = True                       # 9 pixels are too much
    point, label = script_.next_click(pred, truth, labelled)
    assert point[0] == 18 and 6 <= point[1] <= 8 and label == 1
    pred[12:20, 20:30] = True                     # now 80 pixels are too much
    point, label = script_.next_click(pred, truth, labelled)
    assert truth[int(point[1]), int(point[0])] == 0 and label == 0 and 20 <= point[0] < 30
    labelled[12:20, 20:30] = False                # but they are void
    assert script_.next_click(pred, truth, labelled)[1] == 1
    assert script_.next_click(truth, truth, labelled)[0].tolist() == script_.middle(truth).tolist()


def test_boundaries_of_hand_worked_masks():
    """Diagonal 50: boundaries are one pixel wide."""
    truth, labelled = torch.zeros(1, 30, 40).bool(), torch.ones(30, 40).bool()
    truth[0, 10:20, 10:20] = True
    pred = truth.clone()
    assert script_.boundary_iou(pred, truth, labelled).item() == 1
    pred[0, 10:20, 19] = False                    # 36 true, 34 predicted, 26 of them the same
    assert script_.boundary_iou(pred, truth, labelled).item() == pytest.approx(26 / (36 + 34 - 26))
    assert script_.mask_iou(pred, truth, labelled).item() == pytest.approx(0.9)
    truth, labelled = torch.zeros(1, 120, 160).bool(), torch.ones(120, 160).bool()  # diagonal 200: four pixels
    truth[0, 10:60, 10:60] = True
    pred, ring = truth.clone(), 50**2 - 42**2
    pred[0, 14:56, 14:56] = False                 # the ring of four pixels alone
    assert script_.boundary_iou(pred, truth, labelled).item() == 1
    pred[0, 13:57, 13:57] = False                 # of three
    assert script_.boundary_iou(pred, truth, labelled).item() == pytest.approx((50**2 - 44**2) / ring)


class Copy(torch.nn.Module):
    """A net whose logits are what stands in the embedding's first channel, whatever it is asked."""
    image_size = 64

    def postprocess_masks(self, masks, input_size, original_size):
        masks = F.interpolate(masks, (64, 64), mode="bilinear")[..., :input_size[0], :input_size[1]]
        return F.interpolate(masks, tuple(original_size), mode="bilinear")


def test_figures_of_a_hand_worked_image(monkeypatch):
    """A net that always finds the left half of a 64x32 image, object 1 is the upper left quarter, 2 the right half."""
    low = torch.full((1, 1, 16, 16), -9.0)
    low[..., :4] = 9.0

    def decode(model, embeddings, points, labels, boxes, kinds, low_logits, multimask, dtype):
        count = len(points)
        return [low.expand(count, 3 if multimask else 1, -1, -1), torch.full((count, 3 if multimask else 1), 0.75)]
    for module in (sam, script_):
        monkeypatch.setattr(module, "decode", decode)
    ids = torch.zeros(64, 32, dtype=torch.long)
    ids[:32, :16], ids[:, 16:] = 1, 2
    rows = script_.judge(Copy(), torch.zeros(1, 4, 4, 4), ids, torch.tensor([1, 2]), None)
    assert list(rows) == ["val_box_iou", "val_box_biou", "val_click1_iou", "val_click3_iou", "val_click5_iou",
                          "val_iou_error", "box_iou", "disc_iou"]
    box, rim, click1, click3, click5, error, filled, disc = rows.values()
    assert rim.tolist() == pytest.approx([78 / (156 + 92 - 78), 0])  # pixels of both rims, of 64x16 and of 32x16
    assert box.tolist() == click1.tolist() == click3.tolist() == click5.tolist() == [0.5, 0]
    assert error.tolist() == [0.25, 0.75] and filled.tolist() == [1, 1]
    assert disc.tolist() == pytest.approx([0.38, 0.19], abs=0.02)


def test_the_second_pass_gets_the_best_mask_of_each_object(monkeypatch):
    first = torch.arange(6.0).reshape(2, 3, 1, 1).requires_grad_()
    iou = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
    calls = []

    def decode(model, embeddings, points, labels, boxes, kinds, low_logits, multimask, dtype):
        calls.append((low_logits, multimask))
        return (first, iou) if multimask else (first[:, :1], iou[:, :1])
    for module in (sam, script_):
        monkeypatch.setattr(module, "decode", decode)
    script_.two_passes(None, None, None, None, None, None, None)
    assert [multimask for _, multimask in calls] == [True, False] and calls[0][0] is None
    assert calls[1][0].flatten().tolist() == [1, 3]  # mask 1 of the first object, mask 0 of the second
    assert not calls[1][0].requires_grad  # the second pass trains no first one


def test_the_mask_prompt_reaches_the_prompt_encoder():
    torch.manual_seed(0)
    model = script_.NETS["demo"](64).eval()
    points, labels, boxes = torch.full((2, 1, 2), 30.0), torch.ones(2, 1, dtype=torch.long), torch.zeros(2, 4)
    kinds = torch.tensor([script_.POINTS, script_.BOX])
    embeddings = torch.randn(2, *model.image_encoder(torch.zeros(1, 3, 64, 64)).shape[1:])
    earlier = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        outputs = [script_.decode(model, embeddings, points, labels, boxes, kinds, low, False, None)[0]
                   for low in (None, earlier, earlier.flip(0))]
        alone = script_.decode(model, embeddings[1:], points[1:], labels[1:], boxes[1:], kinds[1:], earlier[1:],
                               False, None)[0]
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[1], outputs[2])
    torch.testing.assert_close(outputs[1][1:], alone, atol=1e-4, rtol=1e-4)


def test_an_object_sees_prompts_of_its_kind_alone():
    """As the official classes called for each object by itself, which have no mask of tokens."""
    torch.manual_seed(0)
    model = script_.NETS["demo"](64).eval()
    kinds = torch.tensor([script_.POINTS, script_.BOX, script_.BOTH])
    points, labels = 64 * torch.rand(3, 2, 2), torch.tensor([[1, 0], [1, -1], [1, 0]])
    boxes, earlier = torch.tensor([[5., 6, 30, 40]]).repeat(3, 1), torch.randn(3, 1, 16, 16)
    embeddings = torch.randn(3, *model.image_encoder(torch.zeros(1, 3, 64, 64)).shape[1:])
    with torch.no_grad():
        joint = script_.decode(model, embeddings, points, labels, boxes, kinds, earlier, True, None)
        for i, kind in enumerate(kinds):
            clicks = None if kind == script_.BOX else (points[i:i + 1], labels[i:i + 1])
            box = None if kind == script_.POINTS else boxes[i:i + 1]
            sparse, dense = model.prompt_encoder(clicks, box, earlier[i:i + 1])
            alone = model.mask_decoder(embeddings[i:i + 1], model.prompt_encoder.get_dense_pe(), sparse, dense,
                                       True)
            for one, together in zip(alone, joint):
                torch.testing.assert_close(together[i], one[0], atol=2e-5, rtol=1e-5)


def test_each_click_sees_what_the_ones_before_have_cut_out(monkeypatch):
    """A net that finds too much: each further click is a background one, and the logits are fed back."""
    calls = []

    def decode(model, embeddings, points, labels, boxes, kinds, low_logits, multimask, dtype):
        calls.append((low_logits, labels.tolist(), points.clone()))
        count = 3 if multimask else 1
        return torch.full((1, count, 16, 16), 9.0 + len(calls)), torch.full((1, count), 0.5)
    for module in (sam, script_):
        monkeypatch.setattr(module, "decode", decode)
    ids = torch.zeros(64, 32, dtype=torch.long)
    ids[:16] = 1
    script_.judge(Copy(), torch.zeros(1, 4, 4, 4), ids, torch.tensor([1]), None)
    clicks = calls[2:]  # after the two passes by box
    assert [labels for _, labels, _ in clicks] == [[[1]], [[1]], *[[[1] + [0] * k] for k in (1, 2, 3, 4)]]
    for before, (low_logits, _, _) in zip(range(3, 8), clicks[1:]):
        assert low_logits.flatten()[0] == 9.0 + before
    assert clicks[-1][2][0, 1, 1] > 16  # below the object, in the net's pixels


def test_boxes_reach_the_net_in_its_own_pixels(monkeypatch):
    seen = []

    def decode(model, embeddings, points, labels, boxes, kinds, low_logits, multimask, dtype):
        seen.append((points.clone(), boxes.clone()))
        count = 3 if multimask else 1
        return torch.zeros(1, count, 16, 16), torch.zeros(1, count)
    for module in (sam, script_):
        monkeypatch.setattr(module, "decode", decode)
    script_.segment(Copy(), torch.zeros(1, 4, 4, 4), (20, 32), torch.tensor([[[8.0, 10.0]]]), torch.ones(1, 1),
                    torch.tensor([[4.0, 5.0, 16.0, 15.0]]), script_.BOX, None, None)
    assert seen[0][0].tolist() == [[[16, 20]]] and seen[0][1].tolist() == [[8, 10, 32, 30]]


# --- Embeddings ---

def cached(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_encoder_looks_at_each_image_once_ever(instances, tmp_path, monkeypatch, capsys):
    calls, encoder = [], script_.NETS["demo"](64).image_encoder.__class__
    theirs = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda self, x: calls.append(len(x)) or theirs(self, x))
    train(instances, tmp_path / "a", "--epochs", 3)
    assert sum(calls) == 10 and "making 10 embeddings" in capsys.readouterr().out
    assert len(cached(tmp_path / "embeddings")) == 10
    train(instances, tmp_path / "b", "--epochs", 2)
    assert sum(calls) == 10
    train(instances, tmp_path / "c", "--no-cache", "--epochs", 2)
    assert sum(calls) == 10 + 2 + 2 * (8 + 2 + 2)  # before; each epoch with its samples


def test_a_changed_image_other_weights_another_size_or_precision_never_reuse_an_embedding(instances, tmp_path, capsys):
    folder = tmp_path / "embeddings"
    train(instances, tmp_path / "a")
    names = set(cached(folder))
    for number, more in enumerate((["--seed", 3], ["--image-size", 80], ["--amp", "bf16"])):
        train(instances, tmp_path / f"b{number}", *more)
        assert len(set(cached(folder)) - names) == 10, more
        names = set(cached(folder))
    path = next(voc(instances, "JPEGImages").iterdir())
    utils.save_image(path, 255 - utils.read_image(path))
    train(instances, tmp_path / "c")
    assert len(set(cached(folder)) - names) == 1
    train(instances, tmp_path / "d", "--flip")
    assert len(set(cached(folder)) - names) == 1 + 8  # the training images' mirrored ones


def test_damaged_embeddings_are_made_again_with_a_note(instances, tmp_path, capsys):
    train(instances, tmp_path / "a")
    whole = cached(tmp_path / "embeddings")
    for number, name in enumerate(sorted(whole)[:3]):
        spoilt = bytearray(whole[name][:len(whole[name]) // 2] if number == 0 else whole[name])
        spoilt[len(spoilt) // 2] ^= 1
        (tmp_path / "embeddings" / name).write_bytes(spoilt)
    capsys.readouterr()
    train(instances, tmp_path / "b")
    said = capsys.readouterr().out
    assert said.count(": made again") == 3 and "making 3 embeddings" in said
    assert cached(tmp_path / "embeddings").keys() == whole.keys()
    for name in whole:
        a, b = (torch.load(utils.io.BytesIO(data), weights_only=True)["embedding"]
                for data in (whole[name], (tmp_path / "embeddings" / name).read_bytes()))
        assert torch.equal(a, b)


@pytest.mark.parametrize("state", [{}, {"embedding": torch.zeros(3)}, {"embedding": torch.zeros(2, 2, 2)}, [1]])
def test_a_file_that_is_no_embedding_is_made_again(instances, tmp_path, capsys, state):
    train(instances, tmp_path / "a", "--limit", 2)
    torch.save(state, next((tmp_path / "embeddings").iterdir()))
    train(instances, tmp_path / "b", "--limit", 2)
    assert "not an embedding: made again" in capsys.readouterr().out


def test_an_embedding_damaged_while_training_is_one_line_and_resume_makes_it_again(instances, tmp_path, monkeypatch):
    def evaluate(*args, **kwargs):
        for path in (tmp_path / "embeddings").iterdir():
            path.write_bytes(path.read_bytes()[:-20])
        return original(*args, **kwargs)
    original = script_.evaluate
    monkeypatch.setattr(script_, "evaluate", evaluate)
    with pytest.raises(utils.InputError, match="damaged.*--resume auto makes it again"):
        train(instances, tmp_path / "run", "--limit", 2)
    monkeypatch.setattr(script_, "evaluate", original)
    train(instances, tmp_path / "run", "--limit", 2, "--resume", "auto")


def test_an_image_in_two_data_sets_is_encoded_once(instances, tmp_path, capsys):
    train(instances, tmp_path / "run", "--overfit", 2, "--keep-path", instances)
    assert "making 4 embeddings" in capsys.readouterr().out  # two of both parts, two of --keep-path
    train(instances, tmp_path / "run", "--overfit", 2, "--keep-path", instances, "--epochs", 2, "--resume", "auto",
          "--cache-dir", tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 4


def test_a_full_disk_is_said_beforehand(instances, tmp_path, monkeypatch):
    monkeypatch.setattr(utils.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    refuses(instances, "GB needed, 0.00 GB free", "--cache-dir", "--no-cache")


def test_cached_and_uncached_training_end_in_nearly_the_same_decoder(instances, tmp_path):
    for name, more in (("a", []), ("b", ["--no-cache"])):
        train(instances, tmp_path / name, "--epochs", 3, *more)
    a, b = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "ab")
    torch.manual_seed(41)
    start = script_.NETS["demo"](64).state_dict()
    apart = sum((a[key] - b[key]).square().sum() for key in a).sqrt()
    moved = sum((a[key] - start[key]).square().sum() for key in a).sqrt()
    assert 0 < apart < 0.1 * moved  # embeddings are kept in half precision


# --- Training ---

def test_every_file_is_written_and_testing_repeats_the_figures(instances, tmp_path, capsys):
    figures = train(instances, tmp_path / "run", "--epochs", 3, "--keep-path", instances)
    for name in ("last.pth", "best.pth", "decoder.pth", "log.csv", "curves.png", "val_samples.png", "split.json",
                 "args.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    printed = capsys.readouterr().out
    assert "kept, before" in printed and "blob" in printed and "disc_iou" in printed
    assert set(figures["class_box_iou"]) == {"blob"} and figures["class_box_iou"]["blob"][1] >= 4
    assert figures["class_box_iou"]["blob"][0] == pytest.approx(figures["val_box_iou"])
    for weights in (["--resume", tmp_path / "run/last.pth"], ["--weights", tmp_path / "run/last.pth"]):
        tested = train(instances, tmp_path / "x", "--test-only", *weights)
        assert tested == {key: figures[key] for key in tested}
    with pytest.raises(utils.InputError, match="--masks class: trained with object"):
        train(instances, tmp_path / "x", "--test-only", *weights, "--masks", "class")
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    losses = [float(row.split(",")[rows[0].split(",").index("loss")]) for row in rows[1:]]
    assert losses[-1] < losses[0]


def test_the_panel_shows_the_truth_of_those_that_it_prompts(instances, tmp_path, monkeypatch):
    ids = np.zeros((64, 64), np.int64)
    ids[:60, :60] = np.arange(1, 26).reshape(5, 5).repeat(12, 0).repeat(12, 1)
    drawn = []
    monkeypatch.setattr(script_, "read_ids", lambda item: ids)
    monkeypatch.setattr(script_.utils, "overlay", lambda image, mask: drawn.append(mask > 0) or image)
    train(instances, tmp_path / "run", "--epochs", 1, "--limit", 1)
    truth, _, _ = drawn[-3:]  # by box, by click
    assert np.array_equal(truth, (ids > 0) & (ids <= 20))


def test_the_table_shows_a_last_epoch_that_did_not_beat_the_start_and_the_other_data(instances, tmp_path, capsys):
    """A rate that ruins the decoder: the best is what it began with."""
    import demo_data
    demo_data.write_instances(tmp_path / "plain", 10, rings=False, size=64)
    figures = train(instances, tmp_path / "run", "--lr", 1, "--keep-path", tmp_path / "plain")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (title,) = [row for row in rows if row[:1] == ["%"] and "kept," in row]
    assert title == "% before last, epoch 1 kept, before kept, last".split()
    (box,) = [row[1:] for row in rows if row[:1] == ["val_box_iou"] and len(row) == 5]
    assert float(box[0]) > float(box[1]) and box[2] != box[3]
    assert figures["best_val_box_iou"] == figures["before"]["val_box_iou"] > figures["val_box_iou"]
    best = torch.load(tmp_path / "run/best.pth", weights_only=True)["model"]
    torch.manual_seed(41)
    start = script_.NETS["demo"](64).state_dict()
    assert all(torch.equal(best[key], start[key]) for key in best)


def test_weight_decay_is_on_matrices_alone_and_the_rate_ends_at_the_floor():
    args = options(*SMALL, "--train", "all", "--weight-decay", 0.5, "--min-lr", 0.25, "--lr", 1, "--epochs", 4)
    model, _ = script_.create_model(args)
    decayed, others = script_.create_optimizer(model, args).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0
    spared = r"pos|tokens?\.weight|(?<!patch)_embed\.|embeddings\."
    assert not [names[id(p)] for p in decayed["params"] if p.ndim < 2 or re.search(spared, names[id(p)])]
    assert any("mlp.lin1.weight" in names[id(p)] for p in decayed["params"])
    assert [script_.learning_rate(args, epoch) for epoch in (0, 2, 4)] == pytest.approx([1, 0.625, 0.25])


def test_checkpoints_hold_the_decoder_alone_with_official_keys(instances, tmp_path):
    train(instances, tmp_path / "run")
    decoder = torch.load(tmp_path / "run/decoder.pth", weights_only=True)
    model = script_.NETS["demo"](64)
    assert decoder.keys() == {key for key in model.state_dict() if key.startswith("mask_decoder.")}
    missing, unexpected = model.load_state_dict(decoder, strict=False)
    assert not unexpected and not any(key.startswith("mask_decoder.") for key in missing)
    best = torch.load(tmp_path / "run/best.pth", weights_only=True)
    assert best["model"].keys() == decoder.keys() and best["net"] == "sam"
    assert (tmp_path / "run/best.pth").stat().st_size < 1.1 * (tmp_path / "run/decoder.pth").stat().st_size + 20_000


@pytest.mark.parametrize("train_what", ["decoder", "token", "all"])
def test_only_the_named_part_is_trained(instances, tmp_path, train_what):
    train(instances, tmp_path / "run", "--train", train_what, "--weight-decay", 0.5)
    after = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    torch.manual_seed(41)
    before = script_.NETS["demo"](64).state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    if train_what == "all":
        assert after.keys() == before.keys() and "image_encoder.pos_embed" in changed
        assert "prompt_encoder.no_mask_embed.weight" in changed
        return
    token = ("mask_decoder.mask_tokens.", "mask_decoder.output_hypernetworks_mlps.",
             "mask_decoder.iou_prediction_head.")
    assert all(key.startswith("mask_decoder.") for key in after)
    heads = [f"mask_decoder.output_hypernetworks_mlps.{i}.layers.2.bias" in changed for i in range(4)]
    assert heads[0] and any(heads[1:])  # the second pass; the best of the first
    assert {"mask_decoder.mask_tokens.weight", "mask_decoder.iou_prediction_head.layers.2.bias"} <= changed
    assert ("mask_decoder.transformer.layers.0.mlp.lin1.weight" in changed) == (train_what == "decoder")
    if train_what == "token":
        assert all(key.startswith(token) for key in changed)


@pytest.mark.parametrize("more", [
    ["--point-prompt", "False"], ["--box_prompt", "False"], ["--points", 4], ["--background-points", 0], ["--flip"],
    ["--masks", "class"], ["--amp", "bf16"], ["--accumulate", 2], ["-b", 5], ["--max-objects", 1], ["--no-cache"],
    ["--overfit", 2], ["--limit", 2]])
def test_every_option_trains(instances, tmp_path, more):
    figures = train(instances, tmp_path / "run", *more)
    assert math.isfinite(figures["val_box_iou"])
    model = torch.load(tmp_path / "run/last.pth", weights_only=True)["model"]
    assert all(p.isfinite().all() for p in model.values())


def test_the_gradient_is_the_mean_over_objects_however_they_lie_in_batches(instances, tmp_path):
    for name, more in (("a", ["-b", 8]), ("b", ["-b", 2, "--accumulate", 4]), ("c", ["-b", 3, "--accumulate", 3])):
        train(instances, tmp_path / name, *more)
    a, b, c = (torch.load(tmp_path / name / "last.pth", weights_only=True)["model"] for name in "abc")
    for key in a:
        if "k_proj.bias" not in key:  # whose true gradient is 0
            assert torch.allclose(a[key], b[key], atol=1e-4) and torch.allclose(a[key], c[key], atol=1e-4), key


def test_images_of_any_size_in_one_batch_and_images_without_objects(instances, tmp_path, capsys):
    sizes = [(40, 64), (90, 50), (64, 64), (64, 64), (64, 64)]
    for name, size in zip([f"blob_000{i}" for i in range(1, 6)], sizes):
        utils.save_image(voc(instances, f"JPEGImages/{name}.jpg"), np.zeros((*size, 3), np.uint8))
        ids = np.zeros(size, np.uint8)
        if size != (64, 64):
            ids[5:20, 5:30], ids[30:36, 8:20] = 3, 200
        else:
            ids[3:9] = 255  # void alone
        for sub in ("Object", "Class"):
            save_grey(voc(instances, f"Segmentation{sub}/{name}.png"), ids)
    train(instances, tmp_path / "a", "-b", 6)
    said = capsys.readouterr().out
    assert "2 of 8 training images have no object and are left out" in said and "1 of 2 validation images" in said


def test_an_empty_mask_found_later_does_no_harm(instances, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "READ_WHOLE", 1)
    for name in ("blob_0002", "blob_0003", "blob_0004"):
        save_grey(voc(instances, f"SegmentationObject/{name}.png"), np.zeros((64, 64), np.uint8))
    figures = train(instances, tmp_path / "run", "-b", 1)
    assert math.isfinite(figures["val_box_iou"])
    assert "skipped" not in (tmp_path / "run/log.csv").read_text().splitlines()[1]


def test_validation_images_without_an_object_found_later_count_for_nothing(instances, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "READ_WHOLE", 1)
    first, second = voc(instances, "ImageSets/Segmentation/val.txt").read_text().split()
    more = "--test-only", "--limit", 2, "--weights", tmp_path / "run/best.pth"
    train(instances, tmp_path / "run")
    path = voc(instances, f"SegmentationObject/{second}.png")
    for value in (0, 255):  # nothing, void alone
        save_grey(path, np.full((64, 64), value, np.uint8))
        figures = train(instances, tmp_path / "x", *more)
        assert figures == train(instances, tmp_path / "x", *more[:2], 1, *more[3:])
    monkeypatch.setattr(utils, "READ_WHOLE", 0)
    save_grey(voc(instances, f"SegmentationObject/{first}.png"), np.zeros((64, 64), np.uint8))
    with pytest.raises(utils.InputError, match="no validation mask has an object"):
        train(instances, tmp_path / "x", *more)


def test_a_whole_net_is_tested_without_saying_how_it_was_trained(instances, tmp_path):
    figures = train(instances, tmp_path / "run", "--train", "all")
    more = "--test-only", "--weights", tmp_path / "run/last.pth"
    assert train(instances, tmp_path / "x", *more, "--train", "all")["val_box_iou"] == figures["val_box_iou"]
    assert train(instances, tmp_path / "x", *more)["val_box_iou"] == pytest.approx(figures["val_box_iou"], abs=0.02)
    assert train(instances, tmp_path / "x", *more, "--sanity-check")["train"] == 0


def test_classes_are_checked_before_training(instances, monkeypatch):
    name = voc(instances, "ImageSets/Segmentation/val.txt").read_text().split()[0]
    path = voc(instances, f"SegmentationClass/{name}.png")
    save_grey(path, np.zeros((64, 60), np.uint8))
    for whole in (0, 2000):
        monkeypatch.setattr(utils, "READ_WHOLE", whole)
        refuses(instances, f"{name}.png: 60x64 pixels, but")
    utils.save_image(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    refuses(instances, f"SegmentationClass/{name}.png: colour-coded mask")


def test_a_line_of_pixels_has_a_size():
    assert script_.resized_size(1, 300, 64) == (1, 64)
    assert sam.preprocess(torch.zeros(3, 1, 300, dtype=torch.uint8), 64).shape == (3, 64, 64)


def test_two_hundred_objects_of_an_image_are_judged_eight_at_a_time(monkeypatch):
    ids = torch.arange(1, 201).repeat_interleave(8).reshape(200, 8).repeat_interleave(4, 1)
    dataset = SimpleNamespace(items=[("x", None, None, None)], class_names={})

    class Loader(list):
        pass
    loader, counts = Loader([(torch.zeros(1, 4, 4, 4).half(), ids[None], [0])]), []
    loader.dataset = dataset
    monkeypatch.setattr(script_, "judge", lambda model, embedding, ids, numbers, dtype: counts.append(len(numbers))
                        or {"val_box_iou": numbers / 200})
    run = SimpleNamespace(device=torch.device("cpu"), dtype=None, pinned=False)
    figures = script_.evaluate(SimpleNamespace(eval=lambda: None), loader, run, None)
    assert counts == [8] * 25 and figures == {"val_box_iou": pytest.approx(100.5 / 200), "class_box_iou": {}}
    monkeypatch.setattr(script_, "classes_of", lambda item, ids, numbers: [5 + (k > 150) for k in numbers.tolist()])
    dataset.class_names[5] = "cat"
    per_class = script_.evaluate(SimpleNamespace(eval=lambda: None), loader, run, None)["class_box_iou"]
    assert per_class == {"cat": (pytest.approx(75.5 / 200), 150), "6": (pytest.approx(175.5 / 200), 50)}


def test_the_articles_command_line_runs(instances, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (instances / "VOCdevkit/VOC2012").rename(instances / "VOCdevkit/VOC2007")
    script_.main(options(*f"""--w none --type demo --data {instances / 'VOCdevkit'}
        --point-prompt True --box-prompt True --epochs 1 --batch-size 1 --save_dir ./weights --device cpu
        --image-size 64 -j 0""".split()))
    assert (tmp_path / "weights/decoder.pth").exists()


def test_sanity_check_prints_counts_and_draws_a_panel(instances, tmp_path, capsys):
    train(instances, tmp_path / "run", "--sanity-check")
    printed = capsys.readouterr().out
    assert "train: 8 images, 8 of 64x64" in printed and "objects, 2 to" in printed and "are void" in printed
    assert "at most 3.6 cells" in printed and "--image-size 192 gives" in printed  # sqrt(0.04932) * 64 / 4
    assert (tmp_path / "run/sanity_check.png").exists() and not (tmp_path / "run/last.pth").exists()


# --- Weights ---

def test_an_official_file_loads_at_another_size_and_another_net_is_refused(instances, tmp_path):
    theirs = script_.NETS["demo"](128)
    torch.save(theirs.state_dict(), tmp_path / "official.pth")
    model, _ = script_.create_model(options(*SMALL, "--weights", tmp_path / "official.pth"))
    assert torch.equal(model.mask_decoder.iou_token.weight, theirs.mask_decoder.iou_token.weight)
    assert model.image_encoder.pos_embed.shape == (1, 4, 4, 96)
    refuses(instances, "official.pth: weights of another net than Sam",
            more=["--weights", tmp_path / "official.pth", "--model", "vit_b"])
    torch.save({"format": 2, "net": "unet", "arch": {}, "args": {}, "model": {}}, tmp_path / "unet.pth")
    refuses(instances, "unet.pth: holds net unet", more=["--weights", tmp_path / "unet.pth"])


def test_a_decoder_finds_its_base_and_refuses_another(instances, tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))
        torch.save(script_.NETS["demo"](64).state_dict(), tmp_path / f"{name}.pth")
    figures = train(instances, tmp_path / "run", "--weights", tmp_path / "one.pth")
    tested = train(instances, tmp_path / "x", "--test-only", "--weights", tmp_path / "run/last.pth")
    assert tested == {key: figures[key] for key in tested}
    refuses(instances, "decoder.pth: holds a decoder alone", "--base", more=["--weights", tmp_path / "run/decoder.pth"])
    checkpoint = torch.load(tmp_path / "run/best.pth", weights_only=True)
    del checkpoint["model"]["mask_decoder.iou_token.weight"]
    torch.save(checkpoint, tmp_path / "part.pth")
    refuses(instances, "part.pth: weights of another net", "iou_token.weight missing",
            more=["--weights", tmp_path / "part.pth"])
    shutil.copy(tmp_path / "two.pth", tmp_path / "one.pth")
    refuses(instances, "best.pth: trained on other base weights than", more=["--weights", tmp_path / "run/best.pth"])
    with pytest.raises(utils.InputError, match="trained with base weights of hash"):
        train(instances, tmp_path / "run", "--weights", tmp_path / "one.pth", "--epochs", 2, "--resume", "auto")


def test_a_run_that_starts_from_its_own_best_names_the_base_it_came_from(instances, tmp_path, monkeypatch):
    torch.manual_seed(3)
    torch.save(script_.NETS["demo"](64).state_dict(), tmp_path / "base.pth")
    monkeypatch.chdir(tmp_path)
    train(instances, "run", "--weights", "base.pth")
    train(instances, "run", "--weights", "run/best.pth", "--overwrite")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    figures = train(instances, tmp_path / "x", "--test-only", "--weights", tmp_path / "run/last.pth")
    resumed = train(instances, tmp_path / "x", "--test-only", "--resume", tmp_path / "run/last.pth")
    assert figures == resumed
    (tmp_path / "base.pth").unlink()
    refuses(instances, "best.pth: its decoder was trained on", "base.pth, which is not there", "--base",
            more=["--weights", tmp_path / "run/best.pth"])


@pytest.mark.parametrize("part", ["image_encoder", "prompt_encoder"])
@pytest.mark.parametrize("size", [64, 80])
def test_a_base_that_has_changed_is_refused_wherever_it_is_read(instances, tmp_path, part, size):
    torch.manual_seed(3)
    model = script_.NETS["demo"](64)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    train(instances, tmp_path / "run", "--weights", tmp_path / "base.pth")
    with torch.no_grad():
        next(getattr(model, part).parameters()).add_(0.1)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    refuses(instances, "trained on other base weights", more=["--image-size", size, "--weights",
                                                               tmp_path / "run/best.pth"])
    if size == 64:
        refuses(instances, "base weights of hash", more=["--test-only", "--resume", tmp_path / "run/last.pth"])


def test_weights_of_efficientsam_are_refused_in_one_line(instances, tmp_path):
    from nets.efficient_sam import NETS
    torch.save(NETS["demo"](64).state_dict(), tmp_path / "efficient.pth")
    refuses(instances, "efficient.pth: weights of another net than Sam", more=["--weights", tmp_path / "efficient.pth"])


def test_official_names_are_fetched_by_hash_and_offline_the_url_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(url, path, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    args = options("--model", "demo")
    args.weights = "vit_b"
    with pytest.raises(utils.InputError, match="sam_vit_b_01ec64.pth.*put it at"):
        script_.create_model(args)
    path = tmp_path / "hub/checkpoints/sam_vit_b_01ec64.pth"
    path.write_bytes(b"x")
    with pytest.raises(utils.InputError, match="instead of 375042383, ec2df627"):
        script_.create_model(args)


# --- Bad input ---

@pytest.mark.parametrize("more, words", [
    (["--image-size", "100"], ["--image-size 100", "multiple of 16"]),
     (["--weights", "no.pth"], ["no.pth", "no such file"]),
    (["--resume", "no.pth"], ["no.pth", "no such file"]), (["--test-only"], ["--test-only", "--weights or --resume"]),
    (["--point-prompt", "0", "--box-prompt", "no"], ["--point-prompt", "no prompts are left"]),
    (["--year", "1999"], ["VOC1999", "--year"]), (["--val-set", "other"], ["other.txt: no such list"]),
    (["--keep-path", "nowhere"], ["nowhere: holds neither"])])
def test_options_that_cannot_be(instances, more, words):
    refuses(instances, *words, more=more)


def test_masks_that_cannot_be(instances):
    path = voc(instances, "SegmentationObject/blob_0003.png")
    save_grey(path, np.zeros((64, 40), np.uint8))
    refuses(instances, "SegmentationObject/blob_0003.png: 40x64", "JPEGImages/blob_0003.jpg has 64x64")
    utils.save_image(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    refuses(instances, "blob_0003.png: colour-coded")
    path.unlink()
    refuses(instances, "SegmentationObject/blob_0003: no such image", "train.txt")
    for path in voc(instances, "SegmentationObject").iterdir():
        save_grey(path, np.full((64, 64), 255, np.uint8))
    shutil.copy(path, path.with_name("blob_0003.png"))
    refuses(instances, "SegmentationObject: none of 8 masks has an object")


def test_ids_that_are_not_whole_are_refused(instances):
    from PIL import Image
    path = voc(instances, "SegmentationObject/blob_0003.png")
    Image.fromarray(np.full((64, 64), 0.6, np.float32)).save(path.with_suffix(".tif"))
    path.unlink()
    refuses(instances, "blob_0003.tif: ids must be whole numbers")


def test_ids_of_lists_may_hold_spaces_and_repeat(instances, capsys):
    """Second columns of VOC's own lists are left out; a repeated line is an image that is used twice."""
    for sub, ending in (("JPEGImages", "jpg"), ("SegmentationObject", "png"), ("SegmentationClass", "png")):
        for old, new in (("blob_0000", "photo (4)"), ("blob_0001", "photo"), ("blob_0002", "e\u0301te")):
            voc(instances, sub, f"{old}.{ending}").rename(voc(instances, sub, f"{new}.{ending}"))
    lines = ["photo (4)", "photo 1", "photo (4)", "\u00e9te", "blob_0003  -1"]
    voc(instances, "ImageSets/Segmentation/train.txt").write_text("\n".join(lines), encoding="utf-16")
    items = script_.find_items(voc(instances), "train", options())
    assert [item[0] for item in items] == ["photo (4)", "photo", "photo (4)", "\u00e9te", "blob_0003"]
    assert items[0][1].name == "photo (4).jpg" and items[3][1].exists()
    assert capsys.readouterr().out.count("repeats 1 IDs") == 1


def test_the_sanity_check_of_the_demo_trains_nothing(tmp_path):
    script_.main(options("--demo", "--sanity-check", "--output-dir", tmp_path / "run"))
    assert not list(tmp_path.glob("run/**/*.pth"))


def test_real_folders_pass_the_sanity_check(real_data, tmp_path, capsys):
    train(real_data / "nuclei_instance_voc", tmp_path / "run", "--sanity-check")
    assert "train: 48 images" in capsys.readouterr().out
    train(real_data / "voc2007_sample", tmp_path / "run", "--sanity-check", "--year", 2007)
    assert "train: 2 images" in capsys.readouterr().out
