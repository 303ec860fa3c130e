"""benchmark.py: pairs are equal where they say so, figures come from steps really taken, the ways do as described."""
import inspect
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import benchmark
import epoch_times
import train_sam2
from benchmark import BF16, Case

CPU, PLAIN = torch.device("cpu"), {"plain": True}
TINY = {
    "sam": Case(benchmark.efficient_sam, {"net": "demo", "size": 64}, {"plain": True, "objects": 1}, {"objects": 8},
                own=({"dtype": None, "size": 128}, {"dtype": BF16})),
    "unet": Case(benchmark.unet, {"net": "UNet", "size": 32}, batch=2),
    "data": Case(benchmark.data, {"script": "train_unet", "kind": "cells", "count": 200}, None,
                 batch=2, steps=1, warm_up=0),
    "deeplab": Case(benchmark.deeplabv3, {"net": "mobilenet_v3_large", "size": 32}),
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run("--steps", "1") is benchmark.main on the cases above."""
    monkeypatch.setattr(benchmark, "CASES", TINY)
    monkeypatch.setattr(benchmark, "QUICK", ("sam", "data"))
    threads = torch.get_num_threads()
    yield lambda *options: benchmark.main(benchmark.get_args_parser().parse_args([
        "--threads", "1", "--device", "cpu", "-j", "1", "--output-dir", str(tmp_path), *options]))
    torch.set_num_threads(threads)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """build(make, settings) -> figures, model, compute_loss of a way."""
    made, original = [], benchmark.step_and_inference

    def remember(*args, **options):
        made.append((args[3], args[6]))
        return original(*args, **options)
    monkeypatch.setattr(benchmark, "step_and_inference", remember)
    setup = SimpleNamespace(device=CPU, batch=2, workers=1, threads=torch.get_num_threads(), folder=tmp_path)
    return lambda make, settings: (benchmark.build(make, setup, settings), *(made[-1] if made else ()))


@pytest.mark.parametrize("name", benchmark.CASES)
def test_a_pair_differs_only_in_what_its_case_says(name):
    case = benchmark.CASES[name]
    for column, pair in case.columns(bf16=True).items():
        for settings in pair:
            if settings is not None:
                inspect.signature(case.make).bind(None, **settings)
        if column != "own settings":
            article, ours = pair
            differing = {key for key in {*article, *ours} if article.get(key) != ours.get(key)}
            assert differing == {*case.article, *case.ours}  # neither the size nor the precision
            assert article["dtype"] == (BF16 if column == "bf16" else None)


def test_the_ways_take_turns_and_times_are_per_item():
    calls = []
    seconds = benchmark.time_ways([lambda way=way: calls.append(way) or 1 for way in "ab"], 1, 3, CPU, "x")
    assert calls == list("abababab") and list(map(len, seconds)) == [3, 3]
    functions = [lambda items=items: sum(range(10**6)) and items for items in (1, 1000)]
    one, thousand = benchmark.time_ways(functions, 0, 1, CPU, "x")
    assert one[0] > 50 * thousand[0]


def test_one_table_holds_every_case(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark.utils, "has_bf16", lambda device: True)
    results = run("--quick", "--steps", "1")
    assert list(results) == ["sam", "data"]
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out and "as they take minutes: unet, deeplab.\n" in text
    assert (tmp_path / "benchmark.png").stat().st_size > 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    assert len(lines) == sum(map(len, results.values()))
    for name, figure, *values in lines:
        columns = next(columns for found, columns, _ in results[name] if found == figure)
        for i, column in enumerate(benchmark.COLUMNS):
            article, ours, quotient = values[3 * i:3 * i + 3]
            if name == "data":  # only ours, without precision
                assert not article and not quotient and bool(ours) == (column == "own settings")
            else:
                assert float(quotient) == pytest.approx(columns[column][0] / columns[column][1], abs=0.006)
                assert float(article) == pytest.approx(columns[column][0], rel=0.006)
    assert [figure for _, figure, *_ in lines] == [
        "training step, s/object", "inference, s/object", "peak memory, MB",
        "start-up, 200 images, s", "loader, 0 workers, s/image", "loader, 1 workers, s/image", "peak memory, MB"]
    assert all(f"**{make}**: " in text for make in ("efficient_sam", "data"))


def test_without_bf16_instructions_all_is_float32(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.utils, "has_bf16", lambda device: False)
    rows = run("--cases", "unet", "--steps", "1")["unet"]
    for _, columns, _ in rows:
        assert list(columns) == ["float32", "own settings"] and columns["float32"] == columns["own settings"]
    assert "no instructions for bf16" in (tmp_path / "benchmark.md").read_text()


def test_cases_are_found_by_how_they_begin(capsys):
    assert benchmark.find_cases("deeplabv3") == ["deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50"]
    assert benchmark.find_cases("objects-256") == ["objects-256"]  # not those of more objects
    with pytest.raises(SystemExit):
        benchmark.get_args_parser().parse_args(["--cases", "UNet", "nothing"])
    assert "nothing: no case begins so" in capsys.readouterr().err


def test_a_batch_that_batch_norm_refuses_is_one_line(run):
    with pytest.raises(benchmark.utils.InputError, match="--batch-size 1: batch norm"):
        run("--cases", "deeplab", "-b", "1")


@pytest.mark.parametrize("make, settings", [
    (benchmark.unet, {"net": "UNet", "size": 32}), (benchmark.unet, {"net": "NestedUNet", "size": 32, "monai": True}),
    (benchmark.deeplabv3, {"net": "mobilenet_v3_large", "size": 32}),
    (benchmark.efficient_sam, {"net": "demo", "size": 64, "objects": 2}),
    (benchmark.sam2, {"net": "demo", "size": 64})])
@pytest.mark.parametrize("plain", [False, True])
def test_a_step_changes_the_weights_and_a_prediction_does_not(build, make, settings, plain):
    figures, model, _ = build(make, {**settings, "plain": plain})
    for name, function in reversed(figures.items()):
        before = [p.detach().clone() for p in model.parameters()]
        assert function() >= 1
        changed = any((a != b).any() for a, b in zip(before, model.parameters()))
        assert changed == name.startswith("training step")


def test_attention_written_out_is_the_fused_one(monkeypatch):
    q, k, v = torch.rand(3, 2, 4, 9, 8)
    torch.testing.assert_close(benchmark.written_out_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    model, image = benchmark.sam.sam_demo(64), torch.rand(1, 3, 64, 64)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    ours = benchmark.encode_image(model, image, None, plain=False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # which the official way does without
    torch.testing.assert_close(benchmark.encode_image(model, image, None, plain=True), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen, objects", [(False, 1), (True, 1), (False, 2)])
def test_the_official_way_on_videos_has_our_loss_and_gradient(build, frozen, objects):
    gradients, losses = [], []
    for settings in (PLAIN, {}, {"checkpointing": True}):
        _, model, compute_loss = build(
            benchmark.sam2, {"net": "demo", "size": 64, "objects": objects, "frozen": frozen, **settings})
        images, memories = [], []
        model.image_encoder.register_forward_hook(lambda module, inputs, output: images.append(len(inputs[0])))
        model.memory_encoder.register_forward_hook(lambda *_: memories.append(1))
        loss = compute_loss()
        if settings == PLAIN:  # all frames at once, every frame remembered
            assert (images, len(memories)) == ([4], 4)
        model.eval()  # no dropout
        torch.manual_seed(0)
        loss = compute_loss()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for loss, found in zip(losses[1:], gradients[1:]):
        assert loss == pytest.approx(losses[0], rel=1e-4)
        assert len(found) == len(gradients[0])
        for ours, official in zip(found, gradients[0]):
            torch.testing.assert_close(ours, official, rtol=1e-3, atol=1e-4 * official.abs().max().item() + 1e-5)


@pytest.mark.parametrize("as_prompted", ["True", "False"])
def test_the_official_way_tracks_masks_and_corrections_as_ours_does(as_prompted):
    torch.manual_seed(0)
    args = train_sam2.get_args_parser().parse_args([
        "--model", "demo", "--weights", "none", "--image-size", "64", "--corrected-as-prompted", as_prompted])
    model = train_sam2.create_model(args)[0].eval()
    masks = torch.zeros(4, 2, 64, 64, dtype=torch.bool)
    masks[:, 0, 8:30, 8:30] = masks[:, 1, 35:60, 20:50] = True
    click = {"point_coords": torch.full((2, 1, 2), 20.0), "point_labels": torch.ones(2, 1, dtype=torch.int32)}
    videos = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        backbone = train_sam2.encode(model, torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8), None)
        for prompts, corrected in (({0: {}}, ()), ({0: click, 2: click}, (0, 2, 3)), ({1: {}, 0: {}}, ())):
            clip = train_sam2.Clip(None, masks, prompts, corrected, torch.rand(4, 2, 2))
            ours = [(t, iou, score) for t, passes in train_sam2.track_clips(model, backbone, videos, clip, args, None)
                    for _, iou, score in passes]
            official = benchmark.official_passes(model, backbone, videos, clip, args)
            assert [t for t, *_ in ours] == [t for t, _ in official]
            for (_, iou, score), (_, outputs) in zip(ours, official):
                assert torch.equal(iou, outputs[2]) and torch.equal(score, outputs[-1])


def test_fine_tuning_encodes_each_image_in_the_first_epoch_alone(build, monkeypatch, capsys):
    calls, forward = [], benchmark.sam.ImageEncoder.forward

    def counted(self, images):
        calls.append(len(images))
        return forward(self, images)
    monkeypatch.setattr(benchmark.sam.ImageEncoder, "forward", counted)
    counts = {}
    for plain in (True, False):
        figures, *_ = build(benchmark.decoder, {"net": "demo", "size": 64, "plain": plain})
        for figure, function in figures.items():
            calls.clear()
            function()
            counts[figure, plain] = sum(calls)
    assert counts == {("first epoch, s", True): 2, ("later epoch, s", True): 2, ("encoder, s/image", True): 1,
                      ("first epoch, s", False): 2, ("later epoch, s", False): 0, ("encoder, s/image", False): 1}
    assert not capsys.readouterr().out


@pytest.mark.parametrize("script, kind", [("train_deeplabv3", "scenes"), ("train_efficientsam", "objects")])
def test_a_large_data_set_is_drawn_once_and_linked(build, tmp_path, script, kind):
    start_up, load, _ = build(benchmark.data, {"script": script, "kind": kind, "count": 300})[0].values()
    assert start_up() == 1
    assert sum(path.stat().st_nlink == 3 for path in tmp_path.rglob("*_0000*.*")) == 6
    if kind == "scenes":
        assert load() == 128  # 64 batches of 2
        counts = [len(next(tmp_path.rglob(f"{name}.txt")).read_text().split()) for name in ("train", "val")]
        assert counts == [240, 60]


def test_whole_epochs_are_timed_part_by_part(cells, monkeypatch, capsys):
    monkeypatch.setitem(epoch_times.RUNS, "train_unet", (".", None, None))
    for way, parts in ((epoch_times.run_ours, {"start", *epoch_times.PARTS}),
                       (epoch_times.run_article, {"start", *epoch_times.PARTS} - {"drawing"})):
        started = time.perf_counter()
        seconds = epoch_times.measure(way, "train_unet", "-b 2 --image-size 32", SimpleNamespace(data=cells, epochs=1))
        passed = time.perf_counter() - started
        assert {*seconds} == parts and min(seconds.values()) > 0
        assert 0.8 * passed < sum(seconds.values()) < passed  # each second counts once
