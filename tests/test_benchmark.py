"""benchmark.py: its table comes from steps really taken, every figure is there, and the ways differ as they say."""
import pytest
import torch
import torch.nn.functional as F

import benchmark

CPU = torch.device("cpu")
UNET, SAM = ("train_unet", benchmark.unet), ("train_efficientsam", benchmark.efficient_sam)
TINY = {  # as benchmark.CASES
    "unet": (*UNET, {"net": "UNet", "size": 32}, benchmark.UNET_WAYS, 4, 2, 10),
    "nested": (*UNET, {"net": "NestedUNet", "size": 32}, {"MONAI": {"plain": True, "monai": True}, "ours": {}},
               4, 2, 10),
    "deeplab": ("train_deeplabv3", benchmark.deeplabv3, {"net": "mobilenet_v3_large", "size": 32},
                benchmark.DEEPLAB_WAYS, 4, 2, 10),
    "sam": (*SAM, {"net": "demo"}, {"article": {"plain": True, "size": 128}, "ours 64": {"size": 64}}, 1, 1, 3),
    "objects": (*SAM, {"net": "demo", "size": 64}, benchmark.OBJECT_WAYS, 1, 1, 3),
    "long": (*SAM, {"net": "demo"}, benchmark.SAM_WAYS, 1, 1, 3),
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run("--steps", "1") is benchmark.main on the cases above."""
    monkeypatch.setattr(benchmark, "CASES", TINY)
    monkeypatch.setattr(benchmark, "QUICK", [name for name in TINY if name != "long"])
    threads = torch.get_num_threads()
    yield lambda *options: benchmark.main(benchmark.get_args_parser().parse_args([
        "--threads", "1", "--device", "cpu", "-j", "1", "--output-dir", str(tmp_path), *options]))
    torch.set_num_threads(threads)


def test_the_ways_take_turns_and_warming_up_does_not_count():
    calls = []
    steps = {way: lambda way=way: calls.append(way) for way in "ab"}
    seconds = benchmark.time_steps(steps, 1, 3, CPU, "x")
    assert calls == list("abababab") and [len(seconds[way]) for way in "ab"] == [3, 3]


def test_every_kind_of_case_gives_every_ratio_and_both_files(run, tmp_path, capsys):
    ratios = run("--quick", "--steps", "1")
    assert {name: list(pairs) for name, pairs in ratios.items()} == {
        "unet": ["article / ours", "MONAI / ours"], "nested": ["MONAI / ours"],
        "deeplab": ["article (torchvision) / ours"], "sam": ["article / ours 64"],
        "objects": ["1 a pass / ours, 8 a pass"]}
    for pairs in ratios.values():
        for row in pairs.values():
            assert set(row) == {"training step", "inference", "peak memory", "loader / step"}
            assert all(value > 0 for value in row.values())
    text = (tmp_path / "benchmark.md").read_text()
    assert text in capsys.readouterr().out and "left out by --quick, as they take minutes: long\n" in text
    assert (tmp_path / "benchmark.png").stat().st_size > 0

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.count("|") == 10]
    figures = {(line[0], line[2]): line for line in lines}
    for name, pairs in ratios.items():
        for pair, row in pairs.items():  # the ratio is that of what each image or object takes
            other, ours = [figures[name, way] for way in pair.split(" / ")]
            assert row["training step"] == pytest.approx(float(ours[5]) / float(other[5]), rel=0.02)
            assert row["inference"] == pytest.approx(float(ours[8]) / float(other[8]), rel=0.02)
    eight = figures["objects", "ours, 8 a pass"]
    assert float(eight[4].split()[0]) * float(eight[5]) == pytest.approx(8, rel=0.02)
    assert figures["deeplab", "ours"][3] == figures["deeplab", "article (torchvision)"][3] == "11.03"


def test_ways_in_between_and_long_cases_are_measured_when_asked_for(run):
    ratios = run("--parts", "--quick", "--steps", "1", "--cases", "deeplab")
    assert list(ratios["deeplab"]) == [f"article (torchvision) / {way}" for way in (
        "ours, float32", "ours, contiguous", "ours")]


def test_a_batch_that_batch_norm_refuses_is_one_line(run):
    with pytest.raises(benchmark.utils.InputError, match="--batch-size 1: batch norm"):
        run("--cases", "deeplab", "-b", "1")


def test_written_out_attention_is_the_same_net_without_the_fused_kernel(monkeypatch):
    settings = {"batch": 1, "net": "demo", "size": benchmark.IMAGE_SIDE}
    fused, article = [benchmark.create_step(benchmark.efficient_sam, CPU, train=False, settings={**settings, **way})[0]
                      for way in ({}, {"plain": True})]
    wanted, kernel = fused(), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    got = article()
    assert F.scaled_dot_product_attention is None
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("create, settings", [
    (benchmark.unet, {"net": "UNet", "size": 32}), (benchmark.deeplabv3, {"net": "mobilenet_v3_large", "size": 32}),
    (benchmark.efficient_sam, {"net": "demo", "size": 64, "objects": 2})])
@pytest.mark.parametrize("plain", [False, True])
def test_a_step_changes_the_weights_and_a_prediction_does_not(create, settings, plain):
    for train in (True, False):
        step, model = benchmark.create_step(create, CPU, train, {"batch": 2, "plain": plain, **settings})
        before = [p.detach().clone() for p in model.parameters()]
        step()
        assert train == any((a != b).any() for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("script", benchmark.SCRIPTS)
def test_a_large_data_set_is_drawn_once_and_linked(script, tmp_path):
    benchmark.draw_images(script, tmp_path / script, 50, 32, 10)
    loader = benchmark.create_loader(script, tmp_path / script, 64, 2, 0)
    assert len(loader.dataset) == 40 and len(list(loader)) == 20
    assert {item[1].stat().st_nlink for item in loader.dataset.items} == {5}


def test_start_up_says_seconds_and_memory_of_each_script(run, capsys):
    found = run("--start-up", "20")
    assert list(found) == list(benchmark.SCRIPTS) and all(seconds > 0 for seconds, _ in found.values())
    assert capsys.readouterr().out.count("| 20 ") == 3


def test_fine_tuning_from_kept_embeddings_is_timed_beside_the_articles_way(run, capsys, monkeypatch):
    forward, calls = benchmark.sam.ImageEncoder.forward, []

    def counted(self, images):
        calls.append(len(images))
        return forward(self, images)
    monkeypatch.setattr(benchmark.sam.ImageEncoder, "forward", counted)
    seconds, encoder = run("--fine-tune", "2", "--quick")
    assert list(seconds) == ["article", "ours"] and set(map(len, seconds.values())) == {10}
    assert list(encoder) == ["article", "ours, float32", "ours"]
    assert len(calls) == 3 * 4 + 10 * 2 + 2  # alone, warmed up; the article's epochs; ours in the first alone
    assert capsys.readouterr().out.count("| article") == 2


def test_steps_on_videos_are_timed_beside_the_official_way(run, capsys, monkeypatch):
    ways = ("official", "ours, all of these")
    monkeypatch.setattr(benchmark, "SAM2_WAYS", {way: benchmark.SAM2_WAYS[way] for way in ways})
    found = run("--videos", "1", "--quick")
    assert tuple(found) == ways and all(len(seconds) == 1 and seconds[0] > 0 for seconds, _ in found.values())
    assert "| official " in capsys.readouterr().out


def test_each_way_to_train_on_videos_has_the_loss_and_gradient_of_the_official_one():
    gradients, losses = {}, {}
    for way, settings in benchmark.SAM2_WAYS.items():
        if "dtype" not in settings:
            torch.manual_seed(0)
            model, _, compute_loss, _ = benchmark.sam2("demo", 64, **settings)
            model.eval()  # no dropout
            loss = compute_loss()
            loss.backward()
            losses[way], gradients[way] = loss.item(), model.sam_mask_decoder.conv_s0.weight.grad
    for way, loss in losses.items():
        assert loss == pytest.approx(losses["official"], rel=1e-4), way
        torch.testing.assert_close(gradients[way], gradients["official"], rtol=1e-3, atol=1e-5)
