"""SAM against numbers of the official classes (tests/fixtures/sam, weights drawn from key names)."""
import hashlib
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from conftest import ROOT
from nets import sam
from nets.sam import NETS, WEIGHTS, LayerNorm2d, Sam, resize_positions, resized_size, sam_demo, sam_vit_b
from parity_fill import fill, manifest

pytestmark = pytest.mark.usefixtures("two_threads")
FIXTURES = ROOT / "tests/fixtures/sam"
REGISTRY = json.loads((FIXTURES / "sam_registry.json").read_text())
ATOL = {"small": 1e-4, "vit_b": 3e-4}
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 4, "window_size": 7, "global_attn_indexes": (1, 3)}


def build(name):
    return Sam(256, **SMALL) if name == "small" else sam_vit_b()


def load_reference(name):
    with np.load(FIXTURES / f"sam_{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def resized_image(model, reference):
    """The specification's image (H, W, 3) uint8, its longest side resized."""
    height, width = reference["original_size"].tolist()
    cell = int(reference["cell"])
    random = np.random.RandomState(int(reference["image_seed"]))
    cells = random.randint(0, 256, (-(-height // cell), -(-width // cell), 3)).astype(np.uint8)
    image = cells.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    height, width = resized_size(height, width, model.image_size)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def decode(s, points=None, boxes=None, masks=None, multimask=True):
    """Low-resolution logits and IoU of prompts on the specification's image."""
    sparse, dense = s.model.prompt_encoder(points=points, boxes=boxes, masks=masks)
    return s.model.mask_decoder(
        image_embeddings=s.embedding, image_pe=s.model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=multimask)


@torch.no_grad()
def run(name):
    """A filled model, its inputs of the specification, and the outputs of encoder and two passes."""
    s = SimpleNamespace(model=fill(build(name)).eval(), reference=load_reference(name), atol=ATOL[name])
    s.resized = resized_image(s.model, s.reference)
    s.input = s.model.preprocess(torch.from_numpy(s.resized.copy()).permute(2, 0, 1)[None])
    s.blocks = []
    hooks = [block.register_forward_hook(lambda module, args, out: s.blocks.append(out))
             for block in s.model.image_encoder.blocks]
    s.embedding = s.model.image_encoder(s.input)
    for hook in hooks:
        hook.remove()

    points, labels, boxes = s.reference["points_in"], s.reference["labels"], s.reference["boxes_in"]
    side = s.model.image_size // 4
    random = np.random.RandomState(int(s.reference["mask_prompt_seed"]))
    masks = torch.from_numpy(random.randn(len(points), 1, side, side).astype(np.float32) * 4)
    s.prompts = {
        "points": {"points": (points, labels)},
        "point1": {"points": (points[:, :1], labels[:, :1])},
        "box": {"boxes": boxes},
        "both": {"points": (points, labels), "boxes": boxes},
        "mask": {"masks": masks},
        "all": {"points": (points, labels), "boxes": boxes, "masks": masks},
        "none": {}}

    first, iou = decode(s, **s.prompts["both"])
    s.best = iou.argmax(1)
    s.best_masks = first[torch.arange(len(first)), s.best][:, None]  # (P, 1, 4E, 4E)
    s.second, s.second_iou = decode(s, **s.prompts["both"], masks=s.best_masks, multimask=False)
    return s


@pytest.fixture(scope="module")
def runs():
    """runs("vit_b"): made once, because its encoder takes ten seconds or more on one core."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(name)
        return made[name]
    return get


def check(name, result, expected, atol):
    assert result.shape == expected.shape, name
    difference = (result - expected).abs().max().item() if expected.numel() else 0.0
    assert difference <= atol, f"{name}: {difference}"


both_sizes = pytest.mark.parametrize("name", ["small", "vit_b"])


# --- Equal to the official classes ---

@pytest.mark.parametrize("name", ["small", "vit_b", "vit_l", "vit_h"])
def test_keys_shapes_and_types_are_the_official_ones(name):
    with torch.device("meta"):
        model = build("small") if name == "small" else NETS[name]()
    if name in ("small", "vit_b"):
        expected = json.loads((FIXTURES / f"sam_{name}.json").read_text())["params"]
    else:
        expected = json.loads((FIXTURES / f"sam_{name}_keys.json").read_text())
    assert manifest(model) == expected
    if name != "small":
        registry = REGISTRY[name]
        lines = sorted(f"{key} {shape} {dtype}" for key, (shape, dtype) in manifest(model).items())
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        assert (len(lines), digest) == (registry["tensors"], registry["manifest_sha256"])
        for part, numbers in registry["numbers"].items():
            tensors = getattr(model, part).state_dict().values()
            assert sum(tensor.numel() for tensor in tensors) == numbers
        bytes_of_tensors = 4 * sum(x.numel() for x in model.state_dict().values())
        assert 0 < WEIGHTS[name]["size"] - bytes_of_tensors < 500_000  # beside them, in the file


def test_signatures_are_the_official_ones():
    def names(function):
        return list(inspect.signature(function).parameters)
    model = sam_demo()
    assert names(model.image_encoder.forward) == ["x"]
    assert names(model.prompt_encoder.forward) == ["points", "boxes", "masks"]
    assert names(model.mask_decoder.forward) == [
        "image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings",
        "multimask_output", "used"]  # the last is ours and has a default
    assert names(model.preprocess) == ["x"]
    assert names(model.postprocess_masks) == ["masks", "input_size", "original_size"]
    assert model.image_encoder.img_size == 128 and model.device == torch.device("cpu")
    assert (model.mask_threshold, model.image_format) == (0.0, "RGB")


@both_sizes
def test_image_is_resized_normalised_and_padded_as_published(name, runs):
    s = runs(name)
    assert list(s.resized.shape[:2]) == s.reference["input_size"].tolist()
    assert np.array_equal(s.resized[::16, ::16], s.reference["resized_slice"].numpy())
    assert s.resized.astype(np.int64).sum((0, 1)).tolist() == s.reference["resized_sum"].tolist()
    check("input", s.input[0, :, ::32, ::32], s.reference["input_slice"], 1e-6)
    height, width = s.resized.shape[:2]
    assert (s.input[0, :, height:] == 0).all() and (s.input[0, :, :, width:] == 0).all()


@both_sizes
@torch.no_grad()
def test_image_encoder_equals_the_official_one_block_by_block(name, runs):
    s = runs(name)
    reference, (grid, channels) = s.reference, s.blocks[0].shape[2:]
    step, half, channel_step = max(1, grid // 8), max(1, grid // 16), channels // 16
    patches = s.model.image_encoder.patch_embed(s.input)[0, ::step, ::step, ::channel_step]
    check("patch_embed", patches, reference["patch_embed_slice"], s.atol)
    assert len(s.blocks) == len(reference["block_slices"])
    for i, block in enumerate(s.blocks):
        part = block[0, ::step, ::step, ::channel_step]
        check(f"block {i}", part, reference["block_slices"][i], s.atol)
        mean_std = torch.stack([block.mean(), block.std()]).double()
        check(f"block {i}", mean_std, reference["block_mean_std"][i], s.atol)
    check("embedding", s.embedding[0, ::16, ::half, ::half], reference["embedding_slice"], s.atol)
    mean_std = torch.stack([s.embedding.mean(), s.embedding.std()]).double()
    check("embedding", mean_std, reference["embedding_mean_std"], s.atol)
    dense_pe = s.model.prompt_encoder.get_dense_pe()
    assert dense_pe.shape == (1, 256, grid, grid)
    check("dense_pe", dense_pe[0, ::16, ::half, ::half], reference["dense_pe_slice"], s.atol)


@both_sizes
@pytest.mark.parametrize("case", ["points", "point1", "box", "both", "mask", "all", "none"])
@torch.no_grad()
def test_prompts_and_masks_equal_the_official_ones(name, case, runs):
    s = runs(name)
    sparse, dense = s.model.prompt_encoder(**s.prompts[case])
    if case == "none":
        assert sparse.shape == (1, 0, 256)
    else:
        check("sparse", sparse[:, :, ::8], s.reference[f"{case}.sparse_slice"], s.atol)
    grid = s.model.image_size // 16
    assert dense.shape[1:] == (256, grid, grid)
    if "masks" in s.prompts[case]:
        step = max(1, grid // 8)
        check("dense", dense[:, ::32, ::step, ::step], s.reference[f"{case}.dense_slice"], s.atol)

    stride = 2 if name == "small" else 8
    for kind in ("multi",) if case == "none" else ("multi", "single"):
        masks, iou = decode(s, **s.prompts[case], multimask=kind == "multi")
        assert masks.shape[2:] == (4 * grid, 4 * grid)
        masks = masks[:, :, ::stride, ::stride]
        check("masks", masks, s.reference[f"{case}.low_{kind}"], s.atol)
        check("iou", iou, s.reference[f"{case}.iou_{kind}"], s.atol)


@both_sizes
def test_two_passes_and_their_masks_equal_the_official_ones(name, runs):
    s = runs(name)
    stride = 2 if name == "small" else 8
    assert s.best.tolist() == s.reference["two_pass.best"].tolist()
    check("low", s.second[:, :, ::stride, ::stride], s.reference["two_pass.low"], s.atol)
    check("iou", s.second_iou, s.reference["two_pass.iou"], s.atol)

    original_size = s.reference["original_size"].tolist()
    logits = s.model.postprocess_masks(
        s.second, input_size=s.resized.shape[:2], original_size=original_size)
    assert list(logits.shape) == [len(s.second), 1, *original_size]
    stride = int(s.reference["post.stride"])
    check("logits", logits[:, 0, ::stride, ::stride], s.reference["post.logits"], s.atol)
    check_mask_bits(logits[:, 0] > 0, s.reference)


def check_mask_bits(masks, reference):
    """(P, H, W) bool against the official masks; only pixels whose logit is almost 0 may differ."""
    bits = np.unpackbits(reference["post.mask_bits"].numpy(), count=masks.numel())
    bits = bits.reshape(masks.shape).astype(bool)
    assert bits.sum((1, 2)).tolist() == reference["post.area"].tolist()
    flips = (masks.numpy() != bits).sum((1, 2))
    assert (flips <= reference["post.near_zero"].numpy()).all(), flips


@both_sizes
def test_gradients_of_the_decoder_equal_the_official_ones(name, runs):
    s = runs(name)
    random = np.random.RandomState(int(s.reference["grad.target_seed"]))
    target = torch.from_numpy((random.rand(*s.best_masks.shape) > 0.7).astype(np.float32))
    with torch.no_grad():
        sparse, dense = s.model.prompt_encoder(**s.prompts["both"], masks=s.best_masks)
    image_pe = s.model.prompt_encoder.get_dense_pe()
    masks, _ = s.model.mask_decoder(s.embedding, image_pe, sparse, dense, multimask_output=False)
    loss = F.binary_cross_entropy_with_logits(masks, target)
    assert loss.item() == pytest.approx(s.reference["grad.loss"].item(), abs=s.atol)

    parameters = dict(s.model.mask_decoder.named_parameters())
    expected = json.loads((FIXTURES / f"sam_{name}.json").read_text())["decoder_grad_norms"]
    assert parameters.keys() == expected.keys()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for key, gradient in zip(parameters, gradients):
        if expected[key] is None:
            assert gradient is None, key
        else:
            assert gradient.norm().item() == pytest.approx(expected[key], rel=1e-3, abs=1e-7), key


def test_eps_of_every_norm(runs):
    for name, module in runs("small").model.named_modules():
        if isinstance(module, (nn.LayerNorm, LayerNorm2d)):
            exact = name.startswith("image_encoder") or isinstance(module, LayerNorm2d)
            assert module.eps == (1e-6 if exact else 1e-5), name


# --- Beyond the official classes ---

@torch.no_grad()
def test_several_images_with_several_prompts_equal_each_image_alone(runs):
    model, generator = runs("small").model, torch.Generator().manual_seed(0)
    embeddings = torch.randn(2, 256, 16, 16, generator=generator)
    points = torch.rand(6, 2, 2, generator=generator) * 256
    boxes = torch.rand(6, 4, generator=generator) * 256
    masks = torch.randn(6, 1, 64, 64, generator=generator)
    sparse, dense = model.prompt_encoder((points, torch.tensor([[1, 0]] * 6)), boxes, masks)

    def decode(images, prompts):
        image_pe = model.prompt_encoder.get_dense_pe()
        return model.mask_decoder(embeddings[images], image_pe, sparse[prompts], dense[prompts], True)

    both, first, second = slice(0, 2), slice(0, 1), slice(1, 2)
    masks, iou = decode(both, slice(0, 6))
    assert masks.shape == (6, 3, 64, 64) and iou.shape == (6, 3)
    for image, prompts in ((first, slice(0, 3)), (second, slice(3, 6))):
        masks_alone, iou_alone = decode(image, prompts)
        check("masks", masks[prompts], masks_alone, 1e-5)
        check("iou", iou[prompts], iou_alone, 1e-5)

    masks, _ = decode(both, first)  # one prompt for all images, as in the official code
    check("masks", masks, torch.cat([decode(first, first)[0], decode(second, first)[0]]), 1e-5)
    with pytest.raises(ValueError, match="1 or a multiple of 2 images, got 3"):
        decode(both, slice(0, 3))


@torch.no_grad()
def test_image_encoder_on_a_batch_equals_each_image_alone(runs):
    s = runs("small")
    images = torch.cat([s.input.flip(3), s.input])
    check("embedding", s.model.image_encoder(images)[1:], s.embedding, 1e-5)


@torch.no_grad()
def test_few_heads_at_a_time_equal_all_at_once(runs, monkeypatch):
    attention, x = runs("small").model.image_encoder.blocks[1].attn, runs("small").blocks[0]
    heads, attend = [], sam.Attention.attend

    def counted(q, *rest):
        heads.append(q.shape[1])
        return attend(q, *rest)
    monkeypatch.setattr(sam.Attention, "attend", staticmethod(counted))
    alone = attention(x)
    many = attention(x.expand(100, -1, -1, -1))  # 100 images of 256 tokens
    assert heads == [4, 2, 2]
    check("attention", many[-1:], alone, 1e-5)


@torch.no_grad()
def test_points_labelled_as_padding_are_the_padding_point(runs):
    encoder = runs("small").model.prompt_encoder
    points = torch.tensor([[[20.0, 30], [7, 9]], [[40.0, 50], [60, 70]]])
    labels, boxes = torch.tensor([[1, -1], [1, 0]]), torch.tensor([[10.0, 20, 100, 120], [0, 0, 50, 60]])
    short, _ = encoder(points=(points[:1, :1], labels[:1, :1]))  # the point and the padding point
    padded, _ = encoder(points=(points, labels))
    assert torch.equal(padded[0, :2], short[0]) and torch.equal(padded[0, 2], short[0, 1])
    assert not torch.equal(padded[1, 1], padded[1, 2])           # the other row keeps its second point
    short, _ = encoder(points=(points[:1, :1], labels[:1, :1]), boxes=boxes[:1])
    boxed, _ = encoder(points=(points, labels), boxes=boxes)
    assert torch.equal(boxed[:1, [0, 2, 3]], short) and torch.equal(boxed[0, 1], padded[0, 1])


def test_tables_of_another_size_are_resized():
    state = fill(build("small")).state_dict()
    model = Sam(128, **SMALL)
    distance, place = torch.arange(31.0) - 15, torch.arange(16.0)
    state["image_encoder.blocks.1.attn.rel_pos_h"] = distance[:, None].expand(31, 16)
    ramp = place[:, None] + 100 * place
    state["image_encoder.pos_embed"] = ramp[None, :, :, None].repeat(1, 1, 1, 64)
    state["image_encoder.pos_embed"][..., 5] = (place**2)[:, None]
    resized = resize_positions(state, model)
    model.load_state_dict(resized, strict=True)
    changed = {name for name in state if resized[name] is not state[name]}
    assert changed == {"image_encoder.pos_embed", *(f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"
                                                    for i in (1, 3) for axis in "hw")}
    # away from its ends a ramp stays a ramp, over the whole image or around distance 0
    distance, place = (torch.arange(15.0) - 7) * 31 / 15, 2 * torch.arange(8.0) + 0.5
    table = resized["image_encoder.blocks.1.attn.rel_pos_h"]
    check("rel_pos", table[1:-1, 5], distance[1:-1], 1e-4)
    table, ramp = resized["image_encoder.pos_embed"], place[:, None] + 100 * place
    check("pos_embed", table[0, 2:-2, 2:-2, 3], ramp[2:-2, 2:-2], 1e-2)
    low = 2 * torch.arange(8.0)  # half way between k and k + 1 a cubic gives k^2 + k + 0.125, a line + 0.5
    check("pos_embed", table[0, 2:-2, 3, 5], (low**2 + low + 0.125)[2:-2], 1e-2)
    with torch.no_grad():
        assert model.image_encoder(torch.rand(1, 3, 128, 128)).shape == (1, 256, 8, 8)


def test_tables_of_the_same_size_stay_the_same():
    model = build("small")
    state = fill(build("small")).state_dict()
    resized = resize_positions(state, model)
    assert resized.keys() == state.keys() and all(resized[name] is state[name] for name in state)
    del state["image_encoder.pos_embed"]
    assert "image_encoder.pos_embed" not in resize_positions(state, model)  # load_state_dict will tell


def test_published_sizes_can_be_built_for_smaller_images():
    with torch.device("meta"):
        model = sam_vit_b(512)
    blocks = model.image_encoder.blocks
    assert model.image_encoder.pos_embed.shape == (1, 32, 32, 768)
    assert blocks[2].attn.rel_pos_h.shape == (63, 64) and blocks[0].attn.rel_pos_h.shape == (27, 64)
    assert model.prompt_encoder.get_dense_pe().shape == (1, 256, 32, 32)


def test_demo_is_small_and_its_decoder_can_be_trained():
    torch.manual_seed(0)
    model = sam_demo()
    assert sum(p.numel() for p in model.parameters()) < 2e6
    with torch.no_grad():
        embeddings = model.image_encoder(model.preprocess(torch.rand(2, 3, 96, 128) * 255))
        boxes = torch.tensor([[10.0, 20, 60, 80], [40, 30, 100, 90]])
        sparse, dense = model.prompt_encoder(boxes=boxes)
    image_pe = model.prompt_encoder.get_dense_pe()
    target = torch.zeros(2, 1, 32, 32)
    target[0, :, 5:20, 3:15] = 1
    target[1, :, 8:23, 10:25] = 1
    optimizer = torch.optim.AdamW(model.mask_decoder.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        masks, _ = model.mask_decoder(embeddings, image_pe, sparse, dense, False)
        loss = F.binary_cross_entropy_with_logits(masks, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


@torch.no_grad()
def test_bfloat16_stays_near_float32_and_prompts_keep_their_places(runs):
    s = runs("small")
    coords = torch.tensor([[[100.0, 50.0], [101.0, 50.0]]])
    exact, _ = s.model.prompt_encoder(points=(coords, torch.ones(1, 2)))
    expected, _ = decode(s, **s.prompts["all"])
    with torch.autocast("cpu", torch.bfloat16):
        embedding = s.model.image_encoder(s.input)
        sparse, _ = s.model.prompt_encoder(points=(coords, torch.ones(1, 2)))
        masks, _ = decode(s, **s.prompts["all"])
    assert torch.equal(sparse, exact) and not torch.equal(sparse[:, 0], sparse[:, 1])
    difference = (embedding - s.embedding).abs()  # of a standard deviation of 1
    assert difference.max() < 0.1 and difference.mean() < 0.01
    assert ((masks > 0) != (expected > 0)).float().mean() < 0.01


def test_image_sides_are_rounded_as_published():
    assert resized_size(375, 500, 1024) == (768, 1024)
    assert resized_size(1200, 333, 1024) == (1024, 284)  # 284.16
    assert resized_size(640, 429, 1024) == (1024, 686)   # 686.4
    assert resized_size(427, 640, 1024) == (683, 1024)   # 683.2
    assert resized_size(5, 8, 4) == (3, 4)               # 2.5 is rounded up, not to the even number


def test_bad_sizes_name_the_rule(runs):
    with pytest.raises(ValueError, match="multiple of 16, got 100"):
        sam_vit_b(100)
    with pytest.raises(ValueError, match=r"256 pixels square, got \(64, 64\)"):
        runs("small").model.image_encoder(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"at most 256 pixels long, got \(100, 300\)"):
        runs("small").model.preprocess(torch.zeros(3, 100, 300))
