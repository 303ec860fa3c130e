"""pretrain_sami.py: what the encoder sees, the decoder in numpy, figures by hand, kept features, encoder.pth."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import demo_data
import pretrain_sami as script_
import train_efficientsam
import utils
from nets import efficient_sam, sam

SMALL = ["--model", "demo", "--teacher", "demo", "--teacher-weights", "none", "--teacher-size", "64", "--image-size",
         "56", "--decoder-dim", "32", "--decoder-depth", "1", "-b", "2", "-j", "0", "--device", "cpu", "--lr", "2"]


@pytest.fixture
def images(tmp_path):
    """Folder of eight 48x48 images of several kinds, in nested folders."""
    folder = tmp_path / "images"
    (folder / "a/b").mkdir(parents=True)
    for index in range(8):
        image = demo_data.draw_object_ids(index, 48)[0]
        if index % 2:
            np.save(folder / f"a/b/o{index}.npy", image)
        else:
            Image.fromarray(image).save(folder / f"a/o{index}.png")
    return folder


def options(*texts):
    args = script_.get_args_parser().parse_args([str(text) for text in (*SMALL, *texts)])
    script_.set_sizes(args)
    args.world_size = 1
    return args


def train(folder, output, *more):
    return script_.main(options("--data-path", folder, "--output-dir", output, "--epochs", 1, *more))


def refuses(folder, *expected, more=()):
    output = folder.parent / "refused"
    with pytest.raises(utils.InputError) as caught:
        train(folder, output, *more)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message, message
    assert not (output / "last.pth").exists()


def small_net(grid=4, depth=2, decoder_depth=2, teacher_dim=5):
    """A net of random weights whose encoder sees grid x grid patches of 8 pixels."""
    torch.manual_seed(0)
    net = efficient_sam.EfficientSam(8 * grid, patch_size=8, embed_dim=32, depth=depth, num_heads=1, neck_dim=16,
                                     decoder_mlp_dim=16, upscaling_dims=(16, 8), iou_hidden=16)
    model = script_.Sami(net.image_encoder, 32, decoder_depth, teacher_dim)
    for p in model.parameters():  # biases and norms too
        p.data.add_(0.1 * torch.randn(p.shape))
    return model


def change(image, tokens, patch=8):
    """A copy of image (1, 3, S, S) with other pixels in these tokens' patches."""
    image, columns = image.clone(), image.shape[3] // patch
    for token in tokens:
        y, x = divmod(int(token), columns)
        image[..., patch * y:patch * (y + 1), patch * x:patch * (x + 1)] += torch.randn(1, 3, patch, patch)
    return image


# --- What the encoder sees ---

def test_masked_tokens_never_see_their_own_pixels():
    model, order = small_net(), torch.randperm(16)[None]
    image = torch.randn(1, 3, 32, 32)
    before = model(image, order, 4)
    assert torch.equal(model(change(image, order[0, 4:]), order, 4), before)
    after = model(change(image, order[0, :1]), order, 4)
    assert ((after - before).abs().amax(2) > 1e-5).all()  # one visible patch changes what is told of every token
    image.requires_grad_()
    model(image, order, 4).square().sum().backward()
    reached = image.grad.abs().sum((0, 1)).unfold(0, 8, 8).unfold(1, 8, 8).sum((2, 3)).flatten() > 0
    assert reached.nonzero().flatten().tolist() == sorted(order[0, :4].tolist())


def test_what_is_told_stands_in_the_images_own_order():
    """Neither the order in which visible tokens are given nor that of masked ones matters."""
    model, image, order = small_net(), torch.randn(2, 3, 32, 32), torch.stack([torch.randperm(16) for _ in range(2)])
    other = torch.cat([order[:, :6].flip(1), order[:, 6:].roll(3, 1)], 1)
    assert torch.allclose(model(image, order, 6), model(image, other, 6), atol=1e-5)
    # Each image has its own mask
    alone = torch.cat([model(image[i:i + 1], order[i:i + 1], 6) for i in range(2)])
    assert torch.allclose(model(image, order, 6), alone, atol=1e-5)


def test_without_a_mask_it_is_plain_distillation_by_a_linear_head():
    """The encoder's own forward, its neck taken out, then a matrix."""
    model, image = small_net(), torch.randn(3, 3, 32, 32)
    target = torch.randn(3, 16, 5)
    order = torch.stack([torch.randperm(16) for _ in range(3)])
    loss = script_.criterion(model(image, order, 16), target, torch.ones(3, dtype=torch.bool))
    model.image_encoder.neck = nn.Identity()
    tokens = model.image_encoder(image).flatten(2).transpose(1, 2)
    apart = (tokens @ model.head.weight.T + model.head.bias - target).square().mean((1, 2)).sum()
    assert loss.item() == pytest.approx(apart.item(), rel=1e-5)


def test_one_token_alone_cannot_be_masked(capsys):
    with pytest.raises(SystemExit):
        options("--image-size", 16)
    assert "argument --image-size: 16 must be at least 32" in capsys.readouterr().err


def test_one_block_and_four_tokens_by_hand():
    """One token is visible: the encoder's block and the decoder's in numpy, with one head of 32 channels."""
    model = small_net(grid=2, depth=1, decoder_depth=1)
    weights = {key: value.detach().double().numpy() for key, value in model.state_dict().items()}
    image, order = torch.randn(1, 3, 16, 16), [2, 0, 3, 1]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(q, k, v):
        scores = np.exp(q @ k.T / math.sqrt(32))
        return scores / scores.sum(1, keepdims=True) @ v

    def mlp(x, name):
        x = linear(x, f"{name}.fc1")
        return linear(x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2, f"{name}.fc2")

    patch = image[0, :, 8:, :8].double().numpy()  # of token 2: second row, first column
    x = weights["image_encoder.patch_embed.proj.weight"].reshape(32, -1) @ patch.reshape(-1)
    x = x + weights["image_encoder.patch_embed.proj.bias"]
    x = x[None] + model.image_encoder.position()[0, :, 1, 0].detach().double().numpy()
    block = "image_encoder.blocks.0"
    q, k, v = np.split(linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), 3, 1)
    x = x + linear(attend(q, k, v), f"{block}.attn.proj")
    x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp")

    angle = np.arange(2)[:, None] / 10000 ** (np.arange(8) / 8)
    codes = np.concatenate([np.sin(angle), np.cos(angle)], 1)  # of a row or a column, 16 channels
    position = {token: np.concatenate([codes[token % 2], codes[token // 2]]) for token in range(4)}
    seen = linear(x, "decoder.embed") + position[2]
    masked = weights["decoder.mask_token"] + np.stack([position[token] for token in order[1:]])
    block = "decoder.blocks.0"
    tokens = norm(np.concatenate([seen, masked]), f"{block}.norm1")
    q, k, v = [linear(part, f"{block}.attn.{name}_proj")
               for part, name in ((tokens[1:], "q"), (tokens, "k"), (tokens, "v"))]
    masked = masked + linear(attend(q, k, v), f"{block}.attn.out_proj")
    masked = masked + mlp(norm(masked, f"{block}.norm2"), f"{block}.mlp")
    told = linear(norm(masked, "decoder.norm"), "decoder.unembed")

    expected = np.zeros((4, 5))
    expected[order] = linear(np.concatenate([x, told]), "head")
    assert np.allclose(model(image, torch.tensor([order]), 1)[0].detach(), expected, atol=1e-4)


def test_position_codes_start_as_maes_sines_of_column_and_row():
    net = efficient_sam.NETS["demo"](64).image_encoder
    class_token = net.pos_embed[0, 0].clone()
    codes = script_.Sami(net, 32, 1, 8).image_encoder.pos_embed[0].detach()
    dim, (column, row) = codes.shape[1], (5, 9)
    frequency = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    expected = np.concatenate([f(place * frequency) for place in (column, row) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(codes[1 + 14 * row + column], expected, atol=1e-5)
    assert torch.equal(codes[0], class_token)


def test_padding_does_not_count_and_each_image_counts_once():
    pred, target = torch.zeros(3, 4, 5), torch.ones(3, 4, 5) * torch.tensor([1.0, 2.0, 100.0])[:, None, None]
    assert script_.criterion(pred, target, torch.tensor([True, True, False])).item() == 1 + 4


# --- Data ---

def items_of(images):
    return script_.find_items(images)


def test_every_image_below_the_folder_is_found_and_no_hidden_one(images):
    (images / ".hidden").mkdir()
    for name in ("._a.png", ".hidden/a.png", "notes.txt"):
        (images / name).write_bytes(b"x")
    (images.parent / "elsewhere").mkdir()
    Image.new("L", (9, 9)).save(images.parent / "elsewhere/z.PNG")
    (images / "link").symlink_to(images.parent / "elsewhere")
    (images / "a/loop").symlink_to(images)
    names = [f"a/b/o{i}.npy" for i in (1, 3, 5, 7)] + [f"a/o{i}.png" for i in (0, 2, 4, 6)]
    assert [name for name, _ in items_of(images)] == [*names, "link/z.PNG"]


def test_masks_are_a_quarter_and_drawn_anew_in_each_epoch_from_the_seed(images):
    args = options("--image-size", 112)
    dataset = script_.UnlabelledImages(items_of(images), args, augment=True)
    assert (args.grid, args.num_visible) == (14, 49)
    counts = torch.zeros(196)
    for epoch in range(200):
        torch.manual_seed(epoch)  # which must not matter
        order = dataset[epoch, 3][2]
        assert sorted(order.tolist()) == list(range(196))
        counts[order[:49]] += 1
    assert 0.1 < counts.min() / 200 and counts.max() / 200 < 0.4
    for one, two in zip(dataset[5, 3], dataset[5, 3]):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    assert not torch.equal(dataset[5, 3][2], dataset[6, 3][2]) and not torch.equal(dataset[5, 3][2], dataset[5, 4][2])


@pytest.mark.parametrize("share, visible", [(0, 49), (0.5, 24), (0.9, 5), (0.99, 1)])
def test_the_share_of_the_mask(share, visible):
    assert options("--mask-share", share).num_visible == visible


def unnormalised(image, module):
    """A normalised image back in 0..255."""
    scale = 255 if module is efficient_sam else 1
    mean, std = (scale * torch.tensor(values)[:, None, None] for values in (module.PIXEL_MEAN, module.PIXEL_STD))
    return image * std + mean


def test_encoder_and_sam_see_the_same_crop_mirrored_alike(images):
    """An image whose red is the column and whose green is the row tells where a crop lies."""
    ramp = np.zeros((200, 256, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(256), np.arange(200)[:, None]
    Image.fromarray(ramp).save(images / "ramp.png")
    args = options("--image-size", 64)
    dataset = script_.UnlabelledImages([("ramp.png", images / "ramp.png")], args, augment=True)
    shares, mirrored = [], []
    for epoch in range(60):
        image, seen, _, _ = dataset[epoch, 0]
        image, seen = unnormalised(image, efficient_sam), unnormalised(seen, sam)
        assert torch.allclose(image, seen, atol=0.01)
        width, height = (image[0, 0, -1] - image[0, 0, 0]).item(), (image[1, -1, 0] - image[1, 0, 0]).item()
        shares.append(abs(width) * height / (255 * 199))
        mirrored.append(width < 0)
    assert 0.15 < min(shares) < 0.35 and 0.8 < max(shares) <= 1.05 and 15 < sum(mirrored) < 45
    whole = script_.UnlabelledImages(dataset.items, args, augment=False)[7, 0][0]
    whole = unnormalised(whole, efficient_sam)
    assert whole[0, 0, 0] < 5 and whole[0, 0, -1] > 250 and whole[1, -1, 0] > 194


def test_sams_features_come_onto_the_encoders_grid():
    """Equal grids: as they are; else an average with the weights of a triangle, by hand of a ramp."""
    ramp = torch.arange(4.0).expand(1, 2, 4, 4)
    teacher = SimpleNamespace(image_encoder=lambda images: ramp)
    image = torch.zeros(1, 3, 64, 64)
    assert torch.equal(script_.target_features(teacher, image, SimpleNamespace(grid=4), None), ramp)
    resized = script_.target_features(teacher, image, SimpleNamespace(grid=2), None)
    assert resized.shape == (1, 2, 2, 2)
    assert resized[0, 0, 0].tolist() == pytest.approx([1.25 / 1.75, 3 - 1.25 / 1.75])
    kept = ramp.half()
    assert torch.equal(script_.target_features(None, kept, SimpleNamespace(grid=4), None), ramp)


# --- Kept features ---

def test_without_crops_sam_looks_at_each_image_once_and_with_crops_in_each_epoch(images, tmp_path, monkeypatch):
    calls, theirs = [], sam.ImageEncoder.forward
    monkeypatch.setattr(sam.ImageEncoder, "forward", lambda self, x: calls.append(len(x)) or theirs(self, x))
    monkeypatch.setattr(script_, "print_cost", lambda *args: None)
    train(images, tmp_path / "a", "--crop", "False", "--epochs", 2)
    assert sum(calls) == 8 + 6  # mirrored, of the six to train on
    train(images, tmp_path / "b", "--crop", "False", "--flip", "False", "--epochs", 2)
    assert sum(calls) == 8 + 6
    train(images, tmp_path / "c", "--epochs", 2)
    assert sum(calls) == 8 + 6 + 2 * 6  # whole images, of validation and baselines, are kept here too


def test_kept_features_are_those_of_the_live_teacher_mirrored_too(images, tmp_path):
    args = options("--data-path", images, "--crop", "False", "--output-dir", tmp_path / "run")
    run = utils.Run(args, net="sami")
    teacher = script_.create_teacher(args, run.device)
    live, kept = (script_.UnlabelledImages(items_of(images), args, augment=True) for _ in range(2))
    script_.cache_features(teacher, [kept], run, args)
    assert len(kept.embeddings) == 16
    mirrored = 0
    for epoch in range(6):
        image, features, order, _ = live[epoch, 2]
        same, half, too, _ = kept[epoch, 2]
        assert torch.equal(image, same) and torch.equal(order, too) and half.dtype == torch.float16
        expected = script_.target_features(teacher, features[None], args, None)[0]
        assert torch.allclose(half.float(), expected, atol=2e-3)
        whole = script_.teacher_view(script_.read_image(live.items[2]), (0, 0, 48, 48), False, args)
        mirrored += not torch.equal(features, whole)
    assert 0 < mirrored < 6


def test_another_teacher_size_or_grid_never_reuses_features(images, tmp_path):
    names = set()
    for number, more in enumerate(([], ["--seed", 3], ["--teacher-size", 80], ["--image-size", 64], ["--amp", "bf16"])):
        train(images, tmp_path / f"r{number}", "--limit", 2, "--crop", "False", *more)
        found = {path.name for path in (tmp_path / "embeddings").iterdir()}
        assert len(found - names) == 2 + 2 * 2, more  # those to train on mirrored too
        names = found


# --- Figures ---

class Fixed(nn.Module):
    """Says the same of every image."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def forward(self, image, order, num_visible):
        return self.told


def test_figures_of_a_hand_worked_image(images, monkeypatch):
    """Four tokens with features of two channels, two of them masked."""
    target = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [4.0, 0.0]])
    mean = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])  # of each position; over all (1, 0.5)
    told = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 0.0], [4.0, 0.0]])
    args = SimpleNamespace(grid=2, num_visible=2)
    monkeypatch.setattr(script_, "target_features", lambda *args: target.T.reshape(1, 2, 2, 2))
    loader = [(torch.zeros(1, 3, 4, 4), torch.zeros(1), torch.tensor([[3, 1, 0, 2]]), torch.tensor([0]))]
    run = SimpleNamespace(device=torch.device("cpu"), dtype=None)
    figures = script_.evaluate(Fixed(told[None]), None, mean.T.reshape(2, 2, 2), loader, run, args)
    expected = {"val_masked_error": (0 + 1) / 2, "val_visible_error": (0 + 4) / 2,  # tokens 0, 2 and 3, 1
                "val_masked_cosine": 1 / 2, "val_visible_cosine": (1 + 0) / 2,
                "position_masked_error": (2 + 0) / 2, "position_visible_error": (2 + 0.5) / 2,
                "mean_masked_error": ((4 + 0.25) / 2 + 0.25 / 2) / 2,
                "mean_visible_error": ((9 + 0.25) / 2 + (1 + 2.25) / 2) / 2}
    errors = [(expected[f"{name}_masked_error"] + expected[f"{name}_visible_error"]) / 2 for name in ("val", "mean")]
    assert figures == pytest.approx({**expected, "val_explained": 1 - errors[0] / errors[1]})
    args.num_visible = 4  # no masked tokens
    figures = script_.evaluate(Fixed(target[None]), None, mean.T.reshape(2, 2, 2), loader, run, args)
    assert math.isnan(figures["val_masked_error"]) and figures["val_explained"] == 1


def test_the_baselines_are_of_training_images(images, tmp_path, monkeypatch):
    """Means over at most MEAN_OVER whole training images, never over those that are validated on."""
    monkeypatch.setattr(script_, "MEAN_OVER", 3)
    train(images, tmp_path / "run")
    mean = torch.load(tmp_path / "run/last.pth", weights_only=True)["mean"]
    args = options("--data-path", images, "--output-dir", tmp_path / "run")
    run = utils.Run(args, net="sami")
    teacher = script_.create_teacher(args, run.device)
    split = utils.json.loads((tmp_path / "run/split.json").read_text())
    found = [script_.target_features(teacher, script_.read_teacher_input((name, images / name), False, args)[None],
                                     args, None) for name in split["train"][:3]]
    assert torch.allclose(mean, torch.cat(found).mean(0), atol=2e-3)


# --- Training ---

def test_every_file_is_written_and_testing_repeats_the_figures(images, tmp_path, capsys):
    figures = train(images, tmp_path / "run", "--epochs", 3)
    for name in ("last.pth", "best.pth", "encoder.pth", "log.csv", "curves.png", "val_samples.png", "split.json",
                 "args.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    printed = capsys.readouterr().out
    assert "s per image" in printed and "visible tokens" in printed and "of each position's mean" in printed
    for weights in (["--resume", tmp_path / "run/last.pth"], ["--weights", tmp_path / "run/last.pth"]):
        tested = train(images, tmp_path / "x", "--test-only", *weights)
        assert tested == {key: figures[key] for key in tested}
    with pytest.raises(utils.InputError, match="--mask-share 0.5: trained with 0.75"):
        train(images, tmp_path / "x", "--test-only", *weights, "--mask-share", 0.5)
    rows = (tmp_path / "run/log.csv").read_text().splitlines()
    losses = [float(row.split(",")[rows[0].split(",").index("loss")]) for row in rows[1:]]
    assert losses[-1] < losses[0]


def test_checkpoints_hold_no_teacher_and_encoder_pth_the_best_encoder_with_official_keys(images, tmp_path, monkeypatch):
    true_evaluate, scores = script_.evaluate, iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(script_, "evaluate", lambda *a: {**true_evaluate(*a), "val_explained": next(scores)})
    train(images, tmp_path / "run", "--epochs", 3)
    best, last = (torch.load(tmp_path / f"run/{name}.pth", weights_only=True) for name in ("best", "last"))
    encoder = torch.load(tmp_path / "run/encoder.pth", weights_only=True)
    torch.manual_seed(41)
    net = efficient_sam.NETS["demo"](64).state_dict()
    assert list(encoder) == [key for key in net if key.startswith("image_encoder.")]
    assert all(torch.equal(value, best["model"][key]) for key, value in encoder.items())
    assert any(not torch.equal(value, last["model"][key]) for key, value in encoder.items())
    assert best["best_epoch"] == 2 and best["best"] == 0.3
    assert sum(value.numel() for value in last["model"].values()) < 500_000  # SAM has 1.3 M


def test_the_neck_and_sam_stay_as_they_are_and_all_else_is_trained(images, tmp_path):
    args = options()
    args.teacher_dim = 128
    torch.manual_seed(0)
    model, _ = script_.create_model(args)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = sam.NETS["demo"](64).requires_grad_(False)
    pred = model(torch.randn(2, 3, 56, 56), torch.stack([torch.randperm(49)] * 2), 12)
    target = script_.as_tokens(script_.target_features(teacher, torch.randn(2, 3, 64, 64), args, None))
    assert not target.requires_grad
    script_.criterion(pred, target, torch.ones(2, dtype=torch.bool)).backward()
    script_.create_optimizer(model, args).step()
    for key, p in model.named_parameters():
        moved = not torch.equal(p, before[key])
        assert moved == p.requires_grad != key.startswith("image_encoder.neck"), key


def test_weight_decay_is_on_matrices_alone_and_the_betas_are_the_papers():
    args = options()
    args.teacher_dim = 128
    model, _ = script_.create_model(args)
    decayed, others = script_.create_optimizer(model, args).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim > 1 for p in decayed["params"]) and decayed["weight_decay"] == 0.05
    assert {"image_encoder.pos_embed", "decoder.mask_token"} <= {names[id(p)] for p in others["params"]}
    assert others["weight_decay"] == 0 and decayed["betas"] == (0.9, 0.95)


def test_the_rate_rises_for_forty_epochs_then_falls_to_zero_in_proportion_to_the_images_per_step():
    args = script_.get_args_parser().parse_args(["-b", "64", "--accumulate", "32"])
    args.world_size = 2
    rates = [script_.learning_rate(args, epoch) for epoch in (0, 20, 40, 220, 400)]
    assert rates == pytest.approx([0, 1.2e-3, 2.4e-3, 1.2e-3, 0])
    args.world_size, args.epochs = 1, 10
    assert [script_.learning_rate(args, epoch) for epoch in (2.5, 5, 10)] == pytest.approx([6e-4, 1.2e-3, 0])
    args.warmup_epochs = 0
    assert script_.learning_rate(args, 0) == 1.2e-3


def test_the_rate_is_set_before_each_step(images, tmp_path, monkeypatch):
    rates, true_rate = [], script_.learning_rate
    monkeypatch.setattr(script_, "learning_rate", lambda args, epoch: rates.append(epoch) or true_rate(args, epoch))
    train(images, tmp_path / "run", "--epochs", 2)
    assert rates[::2] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3])  # two groups of parameters


def test_accumulated_batches_give_the_gradient_of_the_larger_batch(images, tmp_path):
    for name, more in (("one", ["-b", 4]), ("two", ["-b", 2, "--accumulate", 2])):
        train(images, tmp_path / name, "--epochs", 2, *more)  # six images: the last step has two
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("one", "two"))
    assert one["count"] == two["count"]
    apart = torch.cat([(value - two["model"][key]).abs().flatten() for key, value in one["model"].items()
                       if not key.endswith(("k_proj.bias", "qkv.bias"))])
    assert (apart > 1e-4).double().mean() < 1e-3


@pytest.mark.parametrize("more", [["--no-cache", "--crop", "False"], ["--mask-share", 0], ["--amp", "bf16"],
                                  ["--overfit", 1], ["--flip", "False", "--crop", "False"], ["-j", 1]])
def test_every_option_trains(images, tmp_path, more):
    figures = train(images, tmp_path / "run", *more)
    assert math.isfinite(figures["val_visible_error"]) and (tmp_path / "run/encoder.pth").exists()


def test_it_learns_what_masked_tokens_are_better_than_the_mean_feature_knows():
    """Of two images in turn, by their visible tokens: features that name the image and the place."""
    model = small_net()
    images, target = torch.randn(2, 3, 32, 32), torch.randn(2, 16, 5)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        order = torch.stack([torch.randperm(16) for _ in range(2)])
        loss = script_.criterion(model(images, order, 4), target, torch.ones(2, dtype=torch.bool))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() / 2 < 0.5 * (target - target.mean(0)).square().mean()  # the mean of each position


def test_another_teacher_is_not_resumed_and_a_moved_file_is(images, tmp_path):
    torch.manual_seed(1)
    for name in ("one", "two"):
        torch.save(sam.NETS["demo"](64).state_dict(), tmp_path / f"{name}.pth")
    train(images, tmp_path / "run", "--teacher-weights", tmp_path / "one.pth")
    (tmp_path / "one.pth").rename(tmp_path / "moved.pth")
    train(images, tmp_path / "run", "--teacher-weights", tmp_path / "moved.pth", "--resume", "auto", "--epochs", 2)
    with pytest.raises(utils.InputError, match="base weights of hash"):
        train(images, tmp_path / "run", "--teacher-weights", tmp_path / "two.pth", "--resume", "auto", "--epochs", 3)


def test_sanity_check_prints_counts_and_draws_a_panel(images, tmp_path, capsys):
    assert train(images, tmp_path / "run", "--sanity-check") == {"train": 6, "val": 2}
    assert "train: 6 images, 6 of 48x48" in capsys.readouterr().out
    assert (tmp_path / "run/sanity_check.png").exists() and not (tmp_path / "run/last.pth").exists()


# --- Mistakes ---

def test_folders_that_cannot_be(images, tmp_path):
    (tmp_path / "empty/deep").mkdir(parents=True)
    refuses(tmp_path / "empty", "no images or .npy files", "--data-path")
    refuses(tmp_path / "none", "none: no such folder")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one/a.png")
    refuses(tmp_path / "one", "0 training and 1 validation images", "add images")
    with pytest.raises(utils.InputError, match="--data-path: give a folder of images, or --demo"):
        script_.main(options())


@pytest.mark.parametrize("name, spoil, words", [
    ("a/o2.png", lambda path: path.write_bytes(path.read_bytes()[:200]), ["o2.png: truncated or unreadable"]),
    ("a/o2.png", lambda path: path.write_text("hello"), ["o2.png: not an image that can be read"]),
    ("a/b/o1.npy", lambda path: np.save(path, np.zeros((4, 4, 7))), ["o1.npy: has shape (4, 4, 7)"]),
    ("a/b/o1.npy", lambda path: np.save(path, np.full((4, 4), np.nan)), ["o1.npy: has values that are not finite"])])
def test_images_that_cannot_be_read_are_one_line(images, name, spoil, words):
    spoil(images / name)
    refuses(images, *words)


def test_a_huge_image_is_one_line(images, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses twice as many
    refuses(images, "a/o0.png: ", "exceeds limit", "save it as .npy, or in parts")


def test_grey_and_16_bit_images_train(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 50).save(tmp_path / f"images/deep{index}.png")
        Image.fromarray(np.arange(30 * 50, dtype=np.uint8).reshape(30, 50)).save(tmp_path / f"images/grey{index}.png")
    assert math.isfinite(train(tmp_path / "images", tmp_path / "run")["val_masked_error"])


@pytest.mark.parametrize("more, words", [
    (["--image-size", 60], ["--image-size 60: must be a multiple of 8"]),
    (["--teacher-size", 100], ["--teacher-size 100: must be a multiple of 16"]),
    (["--decoder-dim", 48], ["--decoder-dim 48: must be a multiple of 32"]),
    (["--teacher-weights", "/none.pth"], ["--teacher-weights /none.pth: no such file"]),
    (["--test-only"], ["--test-only: nothing to test"])])
def test_options_that_cannot_be(images, more, words):
    with pytest.raises(utils.InputError) as caught:
        script_.main(script_.get_args_parser().parse_args(
            [*SMALL, "--data-path", str(images), "--output-dir", str(images.parent / "x"), *map(str, more)]))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_teacher_of_another_kind_is_refused_and_one_of_another_size_is_resized(images, tmp_path):
    torch.save(sam.NETS["demo"](128).state_dict(), tmp_path / "demo.pth")
    train(images, tmp_path / "run", "--teacher-weights", tmp_path / "demo.pth", "--limit", 2)
    torch.save(efficient_sam.NETS["demo"](64).state_dict(), tmp_path / "student.pth")
    refuses(images, "student.pth: weights of another net than Sam",
            more=["--teacher-weights", tmp_path / "student.pth"])


def test_weights_of_another_net_are_refused_in_one_line(images, tmp_path):
    train(images, tmp_path / "run", "--limit", 2)
    refuses(images, "holds", "decoder_dim 32", more=["--weights", tmp_path / "run/best.pth", "--decoder-dim", 64])
    refuses(images, "weights of another net than Sami", more=["--weights", tmp_path / "run/encoder.pth"])


# --- train_efficientsam.py --weights encoder.pth ---

def student(*more):
    """What train_efficientsam.py makes of these options, and the same net without them."""
    made = []
    for texts in (more, ()):
        torch.manual_seed(7)
        args = train_efficientsam.get_args_parser().parse_args(
            ["--model", "demo", "--image-size", "64", "--weights", "none", *map(str, texts)])
        made.append(train_efficientsam.create_model(args)[0].state_dict())
    return made


def test_fine_tuning_starts_from_the_encoder_and_a_line_says_what_is_fresh(images, tmp_path, capsys):
    train(images, tmp_path / "run", "--limit", 2)
    path = tmp_path / "run/encoder.pth"
    encoder = torch.load(path, weights_only=True)
    capsys.readouterr()
    made, fresh = student("--weights", path)
    assert f"{path}: the encoder; of 125 tensors of prompt encoder and decoder 0 are from SAM, 125 start fresh" \
        in capsys.readouterr().out
    for key, value in made.items():
        assert torch.equal(value, encoder[key] if key in encoder else fresh[key]), key
    key = "image_encoder.patch_embed.proj.weight"
    assert not torch.equal(made[key], fresh[key])


def test_the_decoder_starts_from_sams_where_shapes_are_equal(tmp_path, capsys):
    """The demo's nets differ in width: what does not depend on it is taken. Full sizes: everything."""
    torch.manual_seed(3)
    teacher = sam.Sam(64, embed_dim=48, depth=1, num_heads=3, window_size=4, global_attn_indexes=(0,), neck_dim=64,
                      decoder_mlp_dim=256)
    torch.save(teacher.state_dict(), tmp_path / "sam.pth")
    net = efficient_sam.NETS["demo"](64)
    torch.save({key: value for key, value in net.state_dict().items() if key.startswith("image_encoder.")},
               tmp_path / "encoder.pth")
    made, fresh = student("--weights", tmp_path / "encoder.pth", "--decoder-weights", tmp_path / "sam.pth")
    theirs = teacher.state_dict()
    for ours, name in (("mask_decoder.mask_tokens.weight", "mask_decoder.mask_tokens.weight"),
                       ("mask_decoder.transformer.layers.1.mlp.layers.0.0.weight",
                        "mask_decoder.transformer.layers.1.mlp.lin1.weight"),
                       ("mask_decoder.transformer.layers.1.mlp.fc.bias",
                        "mask_decoder.transformer.layers.1.mlp.lin2.bias"),
                       ("mask_decoder.output_hypernetworks_mlps.2.layers.1.0.weight",
                        "mask_decoder.output_hypernetworks_mlps.2.layers.1.weight"),
                       ("prompt_encoder.point_embeddings.weight", "prompt_encoder.point_embeddings.1.weight"),
                       ("prompt_encoder.bbox_top_left_embeddings.weight", "prompt_encoder.point_embeddings.2.weight"),
                       ("prompt_encoder.bbox_bottom_right_embeddings.weight",
                        "prompt_encoder.point_embeddings.3.weight"),
                       ("prompt_encoder.invalid_points.weight", "prompt_encoder.not_a_point_embed.weight")):
        assert torch.equal(made[ours], theirs[name]), ours
    wide = "mask_decoder.final_output_upscaling_layers.0.0.weight"  # 64 to 32 channels, SAM 64 to 16
    assert made[wide].shape != theirs["mask_decoder.output_upscaling.0.weight"].shape
    assert torch.equal(made[wide], fresh[wide])
    said = capsys.readouterr().out
    assert f"are from {tmp_path / 'sam.pth'}, " in said and " 0 start fresh" not in said


def test_of_full_sizes_every_tensor_of_the_decoder_has_one_of_sam():
    with torch.device("meta"):
        ours = efficient_sam.efficient_sam_vitt().state_dict()
        theirs = efficient_sam.rename_sam(sam.sam_vit_b().state_dict())
    ours = {key: value for key, value in ours.items() if not key.startswith("image_encoder.")}
    assert len(ours) == 125 and all(theirs[key].shape == value.shape for key, value in ours.items())


def test_decoder_weights_that_cannot_be(tmp_path):
    net = efficient_sam.NETS["demo"](64).state_dict()
    torch.save(net, tmp_path / "whole.pth")
    encoder = {key: value for key, value in net.items() if key.startswith("image_encoder.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    with pytest.raises(utils.InputError, match="whole.pth is no encoder alone; leave it out"):
        student("--weights", tmp_path / "whole.pth", "--decoder-weights", tmp_path / "whole.pth")
    with pytest.raises(utils.InputError, match="no tensor of it fits"):
        student("--weights", tmp_path / "encoder.pth", "--decoder-weights", tmp_path / "encoder.pth")
    with pytest.raises(utils.InputError, match="--decoder-weights: needs --weights encoder.pth"):
        train_efficientsam.main(train_efficientsam.get_args_parser().parse_args(
            ["--weights", "none", "--decoder-weights", "vit_h"]))
    del encoder["image_encoder.pos_embed"]
    torch.save(encoder, tmp_path / "part.pth")
    with pytest.raises(utils.InputError, match="image_encoder.pos_embed missing"):
        student("--weights", tmp_path / "part.pth")


# --- The demo and real images ---

def test_the_sanity_check_of_the_demo_trains_nothing(tmp_path):
    args = script_.get_args_parser().parse_args(["--demo", "--sanity-check", "--output-dir", str(tmp_path)])
    assert script_.main(args) == {"train": script_.UNLABELLED, "val": script_.HELD_OUT}
    assert not (tmp_path / "teacher").exists()


@pytest.mark.slow
def test_the_demo_s_pretrained_students_beat_fresh_ones(tmp_path, capsys):
    args = script_.get_args_parser().parse_args(["--demo", "--output-dir", str(tmp_path), "--device", "cpu"])
    figures = script_.main(args)
    assert sum(figures["pretrained_val_iou"]) - sum(figures["fresh_val_iou"]) > 3 * 0.05
    assert figures["val_masked_error"] < figures["position_masked_error"] < figures["mean_masked_error"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("mean ")


def test_real_images_pass_the_sanity_check(real_data, tmp_path):
    found = train(real_data / "npy_sample/imgs", tmp_path / "run", "--sanity-check")
    assert found["train"] + found["val"] == 41
