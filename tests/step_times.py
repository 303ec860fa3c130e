"""Prints the step times of all training scripts on CUDA, in bf16: python tests/step_times.py PEAK (docs/gpu.md).

PEAK: what the device can do in bf16 at most, in TFLOP/s. A step is timed with the copy to the device, the loader alone
beside it. Counted are convolutions, products of matrices and attention of one step that is not compiled.
"""
import contextlib
import statistics
import sys
import time
from importlib import import_module
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import demo_data  # noqa: E402
import utils  # noqa: E402

CASES = {  # script: data, how many, options
    "train_unet": ("cells", 200, "-b 16 --image-size 256"),
    "train_deeplabv3": ("scenes", 200, "-b 16 --weights none --num-classes 3"),
    "train_efficientsam": ("objects", 100, "-b 8 --weights none"),
    "finetune_sam_decoder": ("rings", 50, "-b 4 --weights none --year 2012"),
    "pretrain_sami": ("objects", 100, "-b 16 --teacher-weights none"),
    "train_sam2": ("clips", 20, "-b 1 --weights none --multiplier 1")}
run_steps = utils.Run.steps


def measure(name, data, options, compiled, folder):
    """Returns seconds per image (or clip), its FLOPs (last epoch, second step), the loader's images per second."""
    script, seconds, rates, flops = import_module(name), [], [], []

    def timed_steps(run, loader):
        loader.sampler.set_epoch(0)
        started = time.perf_counter()
        rates.append(sum(len(batch[-1]) for batch in loader) / (time.perf_counter() - started))
        for i, batches in enumerate(run_steps(run, loader)):
            counts, images = i == 1 and not compiled, sum(len(batch[-1]) for batch in batches)
            torch.cuda.synchronize()
            started = time.perf_counter()
            with FlopCounterMode(display=False) if counts else contextlib.nullcontext() as counter:
                yield batches
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / images)
            if counts:
                flops.append(counter.get_total_flops() / images)
    line = ["--data-path", data, "--output-dir", f"{folder}/{name}-{compiled}", "--device", "cuda:0", "--amp", "bf16",
            "--epochs", "2", "--compile", compiled, "--overwrite", *options.split()]
    utils.Run.steps = timed_steps
    try:
        with contextlib.redirect_stdout(None):
            script.main(script.get_args_parser().parse_args([*map(str, line)]))
    finally:
        utils.Run.steps = run_steps
    return statistics.median(seconds), flops[-1] if flops else None, rates[-1]


def main(peak, folder, choices=(False, True)):
    """Prints a markdown table, a row as soon as it is known."""
    print("| script | compiled | ms per image | share of peak | loader, images/s | MB |\n|---|---|---|---|---|---|")
    counted = {}
    for name, (kind, count, options) in CASES.items():
        data = demo_data.write(kind, f"{folder}/{name}", count)
        for compiled in choices:
            torch.cuda.reset_peak_memory_stats()
            seconds, flops, rate = measure(name, data, options, compiled, folder)
            counted[name] = flops or counted[name]
            print(f"| {name} | {compiled} | {1000 * seconds:.3g} | {counted[name] / seconds / peak / 1e12:.1%} | "
                  f"{rate:.4g} | {utils.peak_memory_mb(torch.device('cuda')):.0f} |", flush=True)


if __name__ == "__main__":
    parser = utils.ArgumentParser(__doc__.splitlines()[0], "%(prog)s PEAK")
    parser.add_argument("peak", type=utils.number(float, 1), metavar="PEAK", help="TFLOP/s in bf16")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    main(parser.parse_args().peak, "runs/gpu/table")
