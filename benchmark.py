"""Measure our scripts beside their articles' way: training step, inference, memory, and whether the loader keeps up.

    python benchmark.py --quick
    python benchmark.py --device cuda -b 64 --steps 50 --workers 8

The ways take turns, step by step in one process, so that a busy machine slows each alike. A step is forward, loss,
backward and optimizer on a batch that is on the device already. Peak memory: of two steps in a process of their own.
Writes: OUTPUT_DIR/benchmark.md (what it prints), OUTPUT_DIR/benchmark.png (the ratios).
"""
import functools
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

import demo_data
import train_unet
import utils


# --- Options ---

def get_args_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    add, flag = parser.add_argument, {"nargs": "?", "const": True, "default": False, "type": utils.switch}
    add("--output-dir", default="runs/benchmark", help="folder for benchmark.md and benchmark.png (%(default)s)")
    add("--quick", **flag, help="three steps of a quarter of the batch: about a minute on two idle CPU cores")
    add("--cases", nargs="+", metavar="CASE", choices=CASES, default=list(CASES), help=f"{', '.join(CASES)} (all)")
    add("--parts", **flag, help="also measure the ways in between: channels_last alone, bf16 alone")
    add("--steps", type=utils.number(int, 1), help="timed steps of each way (10, with --quick 3)")
    add("-b", "--batch-size", type=utils.number(int, 1), help="items a batch (16 at 96 pixels, 4 at 256)")
    add("-j", "--workers", type=utils.number(int, 1), default=min(4, os.cpu_count()),
        help="loader processes, measured beside none (%(default)s)")
    add("--threads", type=utils.number(int, 1), default=2, help="CPU threads of torch (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, N or mps (%(default)s)")
    return parser


# --- Cases ---

def unet_step(net, size, way, device, batch, train):
    """A function without arguments that does one step of train_unet.py, or without train one prediction."""
    args = train_unet.get_args_parser().parse_args(["--model", net])
    dtype, channels_last, fused = WAYS[way]
    torch.manual_seed(args.seed)
    image = torch.rand(batch, 3, size, size).to(device)
    mask = (torch.rand(batch, 1, size, size) > 0.5).float().to(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = train_unet.create_model(args)[0].train(train).to(device, memory_format=layout)
    optimizer = train_unet.create_optimizer(model, args) if fused else torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)

    def predict():
        if channels_last:
            return train_unet.forward(model, image, dtype)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return model(image).float()

    def step():
        loss = train_unet.criterion(predict(), mask, args.loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step if train else torch.no_grad()(predict)


def unet_loader(size, folder, batch, workers):
    """The training loader of train_unet.py on drawn pictures of this size: 16 batches, the rest is for validation."""
    folder = Path(folder, f"cells_{size}_{batch}")
    if not folder.exists():
        for sub in ("images", "masks"):
            Path(folder, sub).mkdir(parents=True)
        for index in range(20 * batch):
            for sub, pixels in zip(("images", "masks"), demo_data.draw_cells(index, size)):
                utils.save_picture(Path(folder, sub, f"{index}.png"), pixels)
    return train_unet.create_loaders(train_unet.get_args_parser().parse_args([
        f"--data-path={folder}", f"--image-size={size}", f"--batch-size={batch}", f"--workers={workers}"]))[0]


WAYS = {  # autocast to, channels_last, our fused optimizer or torch's plain one
    "article": (None, False, False),
    "float32, channels_last": (None, True, True),
    "bf16, contiguous": (torch.bfloat16, False, True),
    "ours": (torch.bfloat16, True, True),
}
CASES = {  # what makes the step, what makes the loader, net, pixels a side, batch
    "UNet-96": (unet_step, unet_loader, "UNet", 96, 16),
    "UNet-256": (unet_step, unet_loader, "UNet", 256, 4),
    "NestedUNet-96": (unet_step, unet_loader, "NestedUNet", 96, 16),
    "NestedUNet-256": (unet_step, unet_loader, "NestedUNet", 256, 4),
}


# --- Measuring ---

def time_steps(steps, warm_up, count, device, title):
    """{way: function} -> {way: seconds of count calls}; the functions take turns."""
    seconds = {way: [] for way in steps}
    for _ in tqdm(range(warm_up + count), title, leave=False, disable=None):
        for way, step in steps.items():
            utils.check_stop()
            started = time.perf_counter()
            step()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds[way].append(time.perf_counter() - started)
    return {way: values[warm_up:] for way, values in seconds.items()}


def peak_memory(name, way, device, batch, threads):
    """MB that two training steps add to what Python and its imports take (on CUDA: MB of the device)."""
    torch.set_num_threads(threads)
    create_step, _, net, size, _ = CASES[name]
    before = utils.peak_memory_mb(device)
    step = create_step(net, size, way, device, batch, train=True)
    step()
    step()  # the first one makes the optimizer's state, this one holds it from its start
    return utils.peak_memory_mb(device) - before


@functools.cache  # two nets of one size share it
def loader_speed(create_loader, size, folder, batch, workers):
    """Images/s of three epochs of the loader with nothing else going on, the start of its workers included."""
    loader, speeds = create_loader(size, folder, batch, workers), []
    for epoch in range(3):
        utils.check_stop()
        loader.sampler.set_epoch(epoch)
        started = time.perf_counter()
        for _ in loader:
            pass
        speeds.append(len(loader.sampler) / (time.perf_counter() - started))
    return speeds


# --- Report ---

def describe_machine(device):
    """One line, with the load that others put on the machine before we start."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")] + [platform.processor()]
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (f"{names[0]} ({os.cpu_count()} cores, threads used: {torch.get_num_threads()}{load}){gpu}; "
            f"device {device}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}")


def digits(value):
    """At least three digits: 0.0123, 1.20, 1234."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def spread(values):
    return f"{digits(median(values))} ({digits(min(values))} to {digits(max(values))})"


def table(head, rows):
    """Markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "".join("| " + " | ".join(map(str.ljust, line, widths)) + " |\n" for line in lines)


def report(machine, steps, ratios, figures, loaders, args, device):
    """The text of benchmark.md."""
    told = "" if utils.pick_precision("auto", device)[0] else "; on this device bf16 has to be asked for: --amp bf16"
    beyond = "" if device.type == "cuda" else " beyond what the imports took"
    shared = "; beside training it has to share the processor with it" if device.type == "cpu" else ""
    ratio_rows = [[name, *map("{:.2f}".format, row.values())] for name, row in ratios.items()]
    return f"""# The article's way beside ours

{machine}

- article: float32, contiguous, torch's plain optimizer
- ours: bf16 autocast, channels_last, fused optimizer{told}

Ratios, article / ours: above 1 ours takes less time or memory; they say little where the spreads below overlap much.
Loader / step: images/s of the faster loader / images/s of our training step; above 1 the loader alone outruns the step.

{table(["case", "training step", "inference", "peak memory", "loader / step"], ratio_rows)}
Seconds a batch: median (smallest to largest) of {steps} steps. Memory: peak of training{beyond}.

{table(["case", "batch", "way", "training, s", "images/s", "memory, MB", "inference, s", "images/s"], figures)}
Images/s of the loader alone, start of its workers included{shared}.

{table(["case", "batch", "0 workers", f"{args.workers} workers", "our training step"], loaders)}"""


def plot_ratios(path, ratios, title):
    """Bars of {case: {figure: article / ours}}."""
    import matplotlib  # late: it takes a second
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.8 * len(ratios)), layout="constrained")
    for shift, kind in ((-0.26, "training step"), (0, "inference"), (0.26, "peak memory")):
        places, values = [i + shift for i in range(len(ratios))], [row[kind] for row in ratios.values()]
        axis.bar_label(axis.barh(places, values, 0.24, label=kind), fmt="%.2f", padding=3)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(yticks=range(len(ratios)), yticklabels=list(ratios),
             xlabel="article / ours: right of the line ours takes less time or memory")
    axis.set_title(title, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


# --- Main ---

def main(args):
    """Measures the cases; returns {case: {training step, inference, peak memory, loader / step}}, ratios all."""
    device = utils.pick_device(args.device)
    torch.set_num_threads(args.threads)
    machine = describe_machine(device)
    ways = list(WAYS) if args.parts else ["article", "ours"]
    warm_up, steps = (1, args.steps or 3) if args.quick else (2, args.steps or 10)
    ratios, figures, loaders = {}, [], []
    context = multiprocessing.get_context("spawn")
    torch.backends.cudnn.benchmark = True  # as the article's script and ours
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(
            1, context, utils.outlive_signals, (0,), max_tasks_per_child=1) as fresh_process:
        for name in args.cases:
            create_step, create_loader, net, size, batch = CASES[name]
            batch = args.batch_size or (batch // 4 if args.quick else batch)
            try:
                memory = {way: fresh_process.submit(peak_memory, name, way, device, batch, args.threads).result()
                          for way in ways}
            except (BrokenProcessPool, EOFError):  # killed: by Ctrl-C, or by the system
                utils.check_stop()
                raise utils.InputError(f"--batch-size {batch}: {name} ran out of memory; give a smaller one") from None
            training, inference = [time_steps(
                {way: create_step(net, size, way, device, batch, train) for way in ways}, warm_up, steps, device, name)
                for train in (True, False)]
            none, some = [loader_speed(create_loader, size, folder, batch, j) for j in (0, args.workers)]
            speed = {way: batch / median(training[way]) for way in ways}
            ratios[name] = {
                "training step": speed["ours"] / speed["article"],
                "inference": median(inference["article"]) / median(inference["ours"]),
                "peak memory": memory["article"] / memory["ours"],
                "loader / step": max(median(none), median(some)) / speed["ours"]}
            figures += [[name, str(batch), way, spread(training[way]), digits(speed[way]), f"{memory[way]:.0f}",
                         spread(inference[way]), digits(batch / median(inference[way]))] for way in ways]
            loaders.append([name, str(batch), spread(none), spread(some), digits(speed["ours"])])

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = report(machine, steps, ratios, figures, loaders, args, device)
    (output_dir / "benchmark.md").write_text(text)
    plot_ratios(output_dir / "benchmark.png", ratios, machine)
    print(f"{text}\nwrote {output_dir}/benchmark.md {output_dir}/benchmark.png")
    return ratios


if __name__ == "__main__":
    utils.run(main, get_args_parser())
