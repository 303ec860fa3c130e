"""UNet and NestedUNet against numbers of the official classes (tests/fixtures, weights drawn from key names)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nets.unet import NestedUNet, UNet, forward, memory_format
from parity_fill import fill, manifest

FIXTURES = Path(__file__).parent / "fixtures"
CASES = {  # name: net, input seed, input shape, target seed, classes
    "UNet_c1_i3": (lambda: UNet(1, 3), 11, (2, 3, 32, 48), 21, 1),
    "UNet_c4_i1": (lambda: UNet(4, 1), 12, (3, 1, 32, 32), 22, 4),
    "Nested_c1_i3": (lambda: NestedUNet(1, 3), 13, (2, 3, 48, 32), 23, 1),
    "Nested_c3_i3_ds": (lambda: NestedUNet(3, 3, deep_supervision=True), 14, (2, 3, 32, 32), 24, 3),
}


@pytest.fixture(scope="module")
def reference():
    return np.load(FIXTURES / "unet_io.npz", allow_pickle=False)


def build(case, reference):
    make, seed, shape, target_seed, classes = CASES[case]
    image = np.random.RandomState(seed).randn(*shape).astype(np.float32)
    sums = [image.sum(dtype=np.float64), np.square(image, dtype=np.float64).sum()]
    assert np.allclose(sums, reference[f"{case}/input_sum"])
    target = (np.random.RandomState(target_seed).rand(shape[0], classes, *shape[2:]) < 0.4).astype(np.float32)
    return fill(make()), torch.from_numpy(image), torch.from_numpy(target)


def assert_outputs(outputs, reference, prefix, tolerance):
    outputs = outputs if isinstance(outputs, list) else [outputs]
    names = [key for key in reference.files if key.startswith(prefix)]
    assert len(names) == len(outputs)
    for i, output in enumerate(outputs):
        expected = reference[f"{prefix}{i}"]
        assert np.abs(output.detach().numpy() - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name, make", {
    "UNet(1,3)": lambda: UNet(1, 3), "UNet(4,1)": lambda: UNet(4, 1), "NestedUNet(1,3,False)": lambda: NestedUNet(1, 3),
    "NestedUNet(3,3,True)": lambda: NestedUNet(3, 3, True)}.items())
def test_keys_shapes_types_and_order_equal_the_official_manifest(name, make):
    expected = json.loads((FIXTURES / "unet_manifest.json").read_text())[name]
    ours = manifest(make())
    assert ours == expected
    assert list(ours) == list(expected)


def test_parameter_counts_are_the_official_ones():
    counts = [sum(p.numel() for p in m.parameters()) for m in (UNet(1, 3), NestedUNet(1, 3), NestedUNet(1, 3, True))]
    assert counts == [7_852_545, 9_163_329, 9_163_428]


@pytest.mark.parametrize("case", CASES)
def test_eval_outputs_equal_the_official_ones(case, reference):
    model, image, _ = build(case, reference)
    with torch.no_grad():
        assert_outputs(model.eval()(image), reference, f"{case}/eval_out", 1e-4)
        assert_outputs(model.to(memory_format=torch.channels_last)(image), reference, f"{case}/eval_out", 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_train_outputs_loss_gradients_and_statistics_equal_the_official_ones(case, reference):
    from train_unet import criterion
    model, image, target = build(case, reference)
    outputs = model.train()(image)
    assert_outputs(outputs, reference, f"{case}/train_out", 1e-3)
    loss = criterion(outputs, target, "BCEDiceLoss")
    assert abs(loss.item() - reference[f"{case}/train_loss"]) <= 1e-3 * abs(reference[f"{case}/train_loss"])
    loss.backward()
    norms = dict(zip(reference[f"{case}/grad_names"].tolist(), reference[f"{case}/grad_norms"].tolist()))
    parameters = dict(model.named_parameters())
    assert set(norms) == set(parameters)
    for name, parameter in parameters.items():
        if name.endswith(("conv1.bias", "conv2.bias")):  # before a batch norm: truly zero, rounding noise is left
            assert parameter.grad.norm() < 1e-5
        else:  # behind these batch norms float32, theirs or ours, is up to 1.5e-3 from float64
            assert abs(parameter.grad.norm().item() - norms[name]) <= 3e-3 * norms[name], name
    statistics = [key for key in reference.files if key.startswith(f"{case}/conv") and "running" in key]
    assert len(statistics) == 6
    buffers = dict(model.named_buffers())
    for key in statistics:
        assert np.allclose(buffers[key.split("/")[1]].numpy(), reference[key], rtol=1e-3, atol=1e-5), key
    assert int(buffers["conv0_0.bn1.num_batches_tracked"]) == int(reference[f"{case}/num_batches_tracked"]) == 1


@pytest.mark.parametrize("make", [lambda: UNet(1), lambda: NestedUNet(1)])
def test_a_size_that_is_no_multiple_of_16_is_refused_with_the_rule(make):
    with pytest.raises(ValueError, match=r"multiples of 16, got \(100, 96\)"):
        make()(torch.zeros(1, 3, 100, 96))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_depth_gives_that_head_and_leaves_out_what_only_deeper_ones_need(depth):
    model = fill(NestedUNet(3, 3, deep_supervision=True)).eval()
    image, ran = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)), set()
    with torch.no_grad():
        full = model(image)
        for name, block in model.named_children():
            block.register_forward_hook(lambda *_, name=name: ran.add(name))
        assert torch.equal(model(image, depth=depth), full[depth - 1])
    blocks = {f"conv{i}_{j}" for i in range(5) for j in range(5) if i + j <= depth}  # U-Net++ of so many levels
    assert ran == {*blocks, f"final{depth}", "pool", "up"}


@pytest.mark.parametrize("make, depth", [(lambda: NestedUNet(1), 2), (lambda: NestedUNet(1, 3, True), 5)])
def test_a_depth_that_is_not_there_is_refused(make, depth):
    with pytest.raises(ValueError, match="depth must be 1 to 4"):
        make()(torch.zeros(1, 3, 32, 32), depth)


@pytest.mark.parametrize("dtype, wanted, other", [
    (None, torch.contiguous_format, torch.channels_last),
    (torch.bfloat16, torch.channels_last, torch.contiguous_format)])
def test_all_maps_have_the_layout_of_the_weights(dtype, wanted, other):
    model, maps = UNet(1, 3).to(memory_format=memory_format(torch.device("cpu"), dtype)), []
    for part in (model.conv0_0, model.conv2_2, model.conv0_4):
        part.register_forward_hook(lambda part, inputs, output: maps.append(output))
    forward(model, torch.rand(2, 3, 32, 32), dtype)
    for x in maps:
        assert x.is_contiguous(memory_format=wanted) and not x.is_contiguous(memory_format=other)
