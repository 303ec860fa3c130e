"""benchmark.py: its table comes from steps really taken, and every figure is there."""
import torch

import benchmark


def test_the_ways_take_turns_and_warming_up_does_not_count():
    calls = []
    steps = {way: lambda way=way: calls.append(way) for way in "ab"}
    seconds = benchmark.time_steps(steps, 1, 3, torch.device("cpu"), "x")
    assert calls == list("abababab") and [len(seconds[way]) for way in "ab"] == [3, 3]


def test_one_case_gives_every_ratio_and_both_files(tmp_path, capsys):
    threads = torch.get_num_threads()
    ratios = benchmark.main(benchmark.get_args_parser().parse_args([
        "--quick", "--cases", "UNet-96", "-b", "1", "--steps", "1", "--threads", "1", "--device", "cpu", "-j", "1",
        "--output-dir", str(tmp_path)]))
    torch.set_num_threads(threads)
    assert set(ratios["UNet-96"]) == {"training step", "inference", "peak memory", "loader / step"}
    assert all(value > 0 for value in ratios["UNet-96"].values())
    assert (tmp_path / "benchmark.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "benchmark.png").stat().st_size > 0
