"""CUDA's paths without CUDA: whole runs on tensors that say they are on cuda:0, where a mix-up of devices raises.

A FakeCuda tensor holds a CPU tensor and computes with it, so values and branches are real; torch's own FakeTensor
stops at `.item()`, `if mask.any()` and boolean indices. It raises where CUDA would: at two devices in one operation,
numpy() of a CUDA tensor, a copy that does not wait though its memory is not pinned. Autocast, loss scaler, fused
optimizers, checkpoints and resuming run as on CUDA. Left out are kernels, streams, NCCL, torch.compile and the
backward pass, whose engine needs a device: each parameter in the loss's graph gets a gradient of 0.001 instead.
"""
import csv
import functools
import inspect
import itertools
import math
import signal
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import demo_data
import utils
from test_resume import assert_same
from test_scripts import DATA_KIND, NETS, TRAINING

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
NOT_DETERMINISTIC = {  # whose gradient torch.use_deterministic_algorithms refuses on CUDA, of those that nets have
    "upsample_bicubic2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "_adaptive_avg_pool2d",
    "nll_loss2d_forward", "reflection_pad2d", "grid_sampler_2d"}


# --- Tensors ---

class FakeCuda(torch.Tensor):
    """Holds a CPU tensor, and says that it is on cuda:0."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=CUDA)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def __format__(self, spec):
        return format(self.held, spec)

    def __repr__(self):
        return f"FakeCuda({self.held!r})"

    def __reduce_ex__(self, protocol):  # of torch.save
        return self.held.__reduce_ex__(protocol)


class Dispatch(TorchDispatchMode):
    """Sees operations that create tensors, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def dispatch(function, args, kwargs):
    """Calls an operation with the held tensors; the result is on CUDA if an argument is, or `device` says so."""
    tensors = []

    def hold(x):
        tensors.append(x)
        return x.held if isinstance(x, FakeCuda) else x
    held, held_kwargs = change(args, hold), {key: change(value, hold) for key, value in kwargs.items()}
    on_cuda = any(isinstance(x, FakeCuda) for x in tensors)
    if on_cuda:
        check_devices(function, args, tensors)
    if kwargs.get("device") is not None:
        on_cuda = torch.device(kwargs["device"]).type == "cuda"
        held_kwargs["device"] = "cpu"
    if function in COPIES:
        check_blocking(args, kwargs, tensors, on_cuda)
    out = function(*held, **held_kwargs)
    names, written = schema(function)
    if names & NOT_DETERMINISTIC and torch.get_deterministic_debug_mode() == 2 and torch.is_grad_enabled() \
            and any(x.requires_grad for x in tensors):
        raise RuntimeError(f"{function}: has no deterministic gradient")
    if written is not None:
        return args[written]
    return change(out, FakeCuda) if on_cuda else out


def change(value, function):
    """Replaces the tensors in nested lists and tuples by function(tensor)."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)([change(x, function) for x in value]) if isinstance(value, (list, tuple)) else value


@functools.cache
def schema(function):
    """Returns {an operation's name}, and the number of the argument that it writes to and returns, or None."""
    written, returns = None, function._schema.returns
    if returns and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        written = next(i for i, argument in enumerate(function._schema.arguments)
                       if argument.alias_info is not None and argument.alias_info.is_write)
    return {function._schema.name.removeprefix("aten::")}, written


def check_devices(function, args, tensors):
    """Raises for tensors of both devices, but where CUDA takes them: scalars, indices, copies."""
    on_cpu = [x for x in tensors if not isinstance(x, FakeCuda)]
    if function in COPIES:
        return
    if function in INDEXING and isinstance(args[0], FakeCuda):
        on_cpu = [x for x in args[2:3] if not isinstance(x, FakeCuda) and x.ndim]
    elif torch.Tag.pointwise in function.tags or function is aten.fill_.Tensor:
        on_cpu = [x for x in on_cpu if x.ndim or x is args[0] and function._schema.is_mutable]
    if on_cpu:
        found = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{function}: two devices: {found}")


def check_blocking(args, kwargs, tensors, to_cuda):
    """Raises for a copy between the devices that does not wait, unless its source is pinned: it may be unfinished."""
    source = tensors[-1]
    waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
    if len(tensors) == 2:
        to_cuda = isinstance(tensors[0], FakeCuda)
    if not waits and to_cuda != isinstance(source, FakeCuda) and not getattr(source, "pinned", False):
        raise RuntimeError(f"a copy that does not wait, of memory that is not pinned: {tuple(source.shape)}")


def pin(batch, device=None):
    """Does what DataLoader's pin_memory does, in torch 2.10: tuples become lists, named ones do not."""
    if isinstance(batch, torch.Tensor):
        batch = batch.clone()
        batch.pinned = True
    elif isinstance(batch, dict):
        return {key: pin(value) for key, value in batch.items()}
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(pin, batch))
    elif isinstance(batch, (tuple, list)):
        return [pin(value) for value in batch]
    return batch


def backward(loss, value=1e-3):
    """Adds a value to the gradient of each parameter in the loss's graph."""
    assert loss.device == CUDA and loss.ndim == 0
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            gradient = torch.full_like(node.variable, value)
            before = node.variable.grad
            node.variable.grad = gradient if before is None else before + gradient


@pytest.fixture
def cuda(monkeypatch):
    """A machine with one CUDA device, as far as the scripts can see."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch was built without CUDA")
    for module, name, value in [
            (torch.cuda, "_lazy_init", None), (torch.cuda, "is_available", True), (torch.cuda, "device_count", 1),
            (torch.cuda, "is_bf16_supported", True), (torch.accelerator, "is_available", True),
            (torch.accelerator, "current_accelerator", torch.device("cuda")),
            (torch.cuda, "max_memory_allocated", 2**20), (utils.Run, "plot_curves", None),
            (utils, "save_panel", None)]:  # the last two only take time
        monkeypatch.setattr(module, name, lambda *args, value=value, **options: value)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # its batch norm has no CPU kernel
    monkeypatch.setattr(torch.utils.data._utils.pin_memory, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr("nets.unet.CHANNELS", (4, 8, 8, 8, 8))  # faster
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Dispatch():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch._C._set_only_lift_cpu_tensors(False)
    torch.use_deterministic_algorithms(False)


# --- Training ---

DEEPLAB = "--backbone demo --weights none --num-classes 3 --base-size 48 --crop-size 48 --lr 0.01"
ESAM = "--model demo --image-size 64 --lr 0.001"
SAMI = ("--model demo --teacher demo --teacher-weights none --teacher-size 64 --image-size 64 --decoder-dim 32 "
        "--decoder-depth 1 --lr 2")
SAM = "--model demo --weights none --image-size 64 --lr 0.001 --year 2012"
SAM2 = ("--model demo --weights none --image-size 64 --lr 0.001 --vision-lr 0.001 --num-frames 3 --multiplier 1 "
        "--num-correction-points 2")
SMALL = {"train_unet": "--arch UNet --image-size 32 --optimizer Adam", "train_deeplabv3": DEEPLAB,
         "train_efficientsam": ESAM, "train_efficientsam_ddp": ESAM, "pretrain_sami": f"{SAMI} --no-cache",
         "finetune_sam_decoder": f"{SAM} --no-cache", "train_sam2": SAM2}
RUNS = [  # each option that changes what tensors go through, in one of a script's lines
    ("train_unet", "--arch UNet --image-size 32 --optimizer Adam --amp bf16 --accumulate 2 --loss LovaszHingeLoss"),
    ("train_unet", "--arch NestedUNet --deep-supervision --input-w 48 --input-h 32 --nesterov --input-channels 1 "
                   "--loss BCEWithLogitsLoss --scheduler ReduceLROnPlateau --amp off --deterministic"),
    ("train_deeplabv3", f"{DEEPLAB} --amp bf16 --freeze backbone --accumulate 2"),
    ("train_deeplabv3", f"{DEEPLAB} --aux False --amp off --deterministic"),
    ("train_efficientsam", f"{ESAM} --prompt both --multimask all --preprocess article --gradient-checkpointing "
                           "--scheduler cosine --clip-grad 1 --amp bf16"),
    ("train_efficientsam", f"{ESAM} --prompt point --freeze encoder --max-objects 1 --amp off"),
    ("train_efficientsam_ddp", f"{ESAM} --amp bf16"),
    ("pretrain_sami", f"{SAMI} --crop False --amp bf16 --accumulate 2"),
    ("pretrain_sami", f"{SAMI} --mask-share 0 --no-cache --image-size 112 --amp off --deterministic"),
    ("finetune_sam_decoder", f"{SAM} --train all --points 3 --box-prompt False --amp bf16"),
    ("finetune_sam_decoder", f"{SAM} --train token --no-cache --point-prompt False --masks class --amp off "
                             "--deterministic --limit 1"),
    ("train_sam2", f"{SAM2} --prob-points 1 --prob-box 1 --gradient-checkpointing --amp bf16 --corrected-frames 3 "
                   "--supervise-all-iou False --iou-use-l1-loss False --focal-alpha-obj-score 0.5"),
    ("train_sam2", f"{SAM2} --prob-points 0 --freeze image_encoder --amp off --deterministic --pred-obj-scores False"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data("cells") -> folder of five such images, or clips of four frames; one to validate on."""
    root = tmp_path_factory.mktemp("data")

    @functools.cache
    def write(kind):
        folder = demo_data.write(kind, root / kind, 5)
        for path in root.glob("clips/*/*/0*"):
            if int(path.stem) > 3:
                path.unlink()
        for path in root.glob(f"{kind}/**/val.txt"):
            path.write_text(path.read_text().splitlines()[0])
        return folder
    return write


@pytest.fixture
def train(cuda, data, tmp_path):
    """train("train_unet", options) -> figures of a run of two steps on cuda:0, in tmp_path/run."""
    def call(name, options, *more, output="run"):
        script = import_module(name)
        line = ["--data-path", data(DATA_KIND[name]), "--output-dir", tmp_path / output, "--device", "cuda:0", "-j", 0,
                "-b", 2, "--limit", 4, "--epochs", 1, *options.split(), *more]
        return script.main(script.get_args_parser().parse_args([*map(str, line)]))
    return call


@pytest.mark.parametrize("name, options", RUNS, ids=lambda text: text[:20])
def test_training(train, tmp_path, name, options):
    train(name, options)
    checkpoint = torch.load(tmp_path / "run/last.pth", weights_only=True)
    assert checkpoint["epoch"] == 1 and checkpoint["args"]["device"] == "cuda:0"


# --- fp16, resuming, NCCL ---

@pytest.mark.parametrize("name", TRAINING)
def test_fp16_stopped_and_resumed_ends_in_the_straight_runs_bits(train, tmp_path, name, monkeypatch, request):
    """Of two steps the first has no finite gradient: it is skipped and halves the loss scale."""
    if name not in ("train_unet", "train_sam2") and not request.config.getoption("--slow"):
        pytest.skip("slow: run with --slow")
    values = itertools.cycle([math.inf, 1e-3])  # straight; then the first step, and the second
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backward(loss, next(values)))
    options = f"{SMALL[name]} --amp fp16 --save-every 1"
    train(name, options, output="straight")
    finish_gradient = utils.Run.finish_gradient

    def stop(*args, **more):
        utils.remember_signal(signal.SIGTERM, None)
        return finish_gradient(*args, **more)
    with monkeypatch.context() as patch, pytest.raises(utils.Stopped):
        patch.setattr(utils.Run, "finish_gradient", stop)
        train(name, options)
    utils._signals.clear()
    train(name, options, "--resume", "auto")
    straight, resumed = [torch.load(tmp_path / run / "last.pth", weights_only=True) for run in ("straight", "run")]
    assert_same(straight, resumed)
    assert straight["scaler"]["scale"] == 2**15
    with open(tmp_path / "run/log.csv", newline="") as file:
        assert [row["skipped"] for row in csv.DictReader(file)] == ["1"]


@pytest.mark.parametrize("name", TRAINING)
def test_nccl_is_given_tensors_on_cuda(train, name, monkeypatch):
    """A second process, whose numbers are those of the first: NCCL refuses tensors on the CPU."""
    def reduce(tensor):
        assert tensor.device == CUDA and tensor.is_contiguous()
        reduced.append(tensor)
        tensor.mul_(2)

    def broadcast(tensor, source):
        assert tensor.device == CUDA

    def gather(parts, part):
        parts[:] = [part, {index + 1: result for index, result in part.items()}]
    reduced = []
    for function, value in [("is_initialized", lambda: True), ("get_rank", lambda: 0), ("get_world_size", lambda: 2),
                            ("get_backend", lambda: "nccl"), ("all_reduce", reduce), ("broadcast", broadcast),
                            ("all_gather_object", gather), ("barrier", lambda: None)]:
        monkeypatch.setattr(torch.distributed, function, value)
    monkeypatch.setattr("train_efficientsam_ddp.DistributedDataParallel", lambda model, **options: model)
    train(name, f"{SMALL[name]} --amp off")
    assert len(reduced) > 5


# --- Prediction, benchmark ---

BOX, CLICK, ALL = "--box 10,10,60,60", "--point 30,30", "--everything 3 --min-iou 0 --min-stability 0"
PREDICTED = [  # script, options of its net, of predict.py
    ("train_unet", "--arch UNet --image-size 32", "--tile 48 --flip --scales 1,0.5 --amp bf16 -b 2"),
    ("train_unet", "--arch NestedUNet --deep-supervision --image-size 32 --num-classes 2", "--depth 2 --amp fp16"),
    ("train_deeplabv3", DEEPLAB, "--flip --scales 1,0.5 --amp bf16 -b 2"),
    ("train_efficientsam", f"{ESAM} --preprocess article", f"{BOX} {CLICK} --all-masks --amp bf16"),
    ("train_efficientsam", ESAM, f"{ALL} --coco rle"),
    ("finetune_sam_decoder", f"{SAM} --train all", f"{BOX} {CLICK} --amp bf16"),
    ("finetune_sam_decoder", f"{SAM} --train all", f"{ALL} --amp fp16"),
    ("train_sam2", SAM2, f"{CLICK} --amp bf16"),
    ("train_sam2", SAM2, ALL),
]


@pytest.fixture
def predict(cuda, data, tmp_path):
    """predict("train_unet", its options, more) -> the figures of predict.py, or of `script`, on cuda:0."""
    def call(name, options, more, script="predict", inputs=None):
        trainer, script = import_module(name), import_module(script)
        args = trainer.get_args_parser().parse_args([*options.split(), "--weights", "none"])
        torch.manual_seed(0)
        model, arch = trainer.create_model(args)
        classes = [str(k) for k in range(arch.get("num_classes", 0))]
        torch.save({"format": 2, "net": NETS[name], "arch": arch, "classes": classes, "args": vars(args),
                    "model": model.state_dict()}, tmp_path / "net.pth")
        inputs = inputs or sorted((data("cells") / "images").iterdir())[:2]
        line = ["--weights", tmp_path / "net.pth", "--output-dir", tmp_path / "out", "--device", "cuda:0",
                *more.split(), *inputs]
        return script.main(script.get_args_parser().parse_args([*map(str, line)]))
    return call


@pytest.mark.parametrize("name, options, more", PREDICTED, ids=lambda text: text[:20])
def test_predicting(predict, tmp_path, name, options, more):
    assert predict(name, options, more) == {"images": 2}
    assert len([*tmp_path.glob("out/*_mask.png")]) == 2


def test_tracking_stopped_and_started_again(predict, data, tmp_path, monkeypatch):
    """Two objects by boxes, clicks and a mask, on several frames; one of them backwards too."""
    frames = data("clips") / "JPEGImages/clip_0000"
    mask = data("clips") / "Annotations/clip_0000/00000.png"
    more = f"{BOX}@00001:200 {CLICK}@00002:200 --mask {mask}@00000 --amp fp16 --overlay False"
    import predict_video
    compose, calls = predict_video.compose, itertools.count()

    def stop(*args):
        if next(calls) == 1:
            utils.remember_signal(signal.SIGTERM, None)
        return compose(*args)
    monkeypatch.setattr(predict_video, "compose", stop)
    with pytest.raises(utils.Stopped):
        predict("train_sam2", SAM2, more, "predict_video", [frames])
    utils._signals.clear()
    assert predict("train_sam2", SAM2, more, "predict_video", [frames])["frames"] == len([*frames.iterdir()])


@pytest.mark.parametrize("make, settings", [
    ("unet", {"net": "UNet", "size": 32}), ("deeplabv3", {"net": "demo", "size": 32}),
    ("efficient_sam", {"net": "demo", "size": 64, "objects": 2}), ("sam2", {"net": "demo", "size": 64}),
    ("decoder", {"net": "demo", "size": 64})], ids=lambda value: value if isinstance(value, str) else "")
def test_benchmark(cuda, make, settings, tmp_path):
    import benchmark
    setup = SimpleNamespace(device=CUDA, batch=2, workers=0, folder=tmp_path)
    for plain in (False, True):
        if plain and make == "deeplabv3":  # torchvision has no demo net
            continue
        for function in getattr(benchmark, make)(setup, plain=plain, dtype=torch.bfloat16, **settings).values():
            assert function() >= 1


def test_step_times(cuda, monkeypatch, tmp_path, capsys):
    """The table of docs/gpu.md, with small nets."""
    import step_times
    small = {"train_unet": ("cells", 6, f"{SMALL['train_unet']} -b 2 -j 0"),
             "train_deeplabv3": ("scenes", 5, f"{DEEPLAB} -b 2 -j 0")}
    monkeypatch.setattr(step_times, "CASES", small)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    step_times.main(1e-6, tmp_path, choices=[False])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[2:]] == list(small)
    assert all(float(row[2]) > 0 and float(row[3][:-1]) > 0 and float(row[4]) > 0 for row in rows[2:])


# --- What is found ---

TRAINED = dict(reversed(RUNS))  # the first line of each script
MIX_UPS = [  # module, function, what stands there, what is planted
    ("train_unet", "evaluate", "mask[None].to(run.device)", "mask[None]"),
    ("train_deeplabv3", "evaluate", "dtype=torch.int64, device=run.device", "dtype=torch.int64"),
    ("train_efficientsam", "evaluate", "len(guess), device=run.device", "len(guess)"),
    ("train_efficientsam_ddp", "train_one_epoch", "for part in batch[:-1]]", "for part in batch[:-2]] + [batch[-2]]"),
    ("pretrain_sami", "evaluate", "mean[None].to(run.device)", "mean[None]"),
    ("finetune_sam_decoder", "segment", "kind, device=device", "kind"),
    ("train_sam2", "train_one_epoch", "],\n                           device=run.device)", "])"),
]


@pytest.mark.parametrize("name, function, old, new", MIX_UPS, ids=lambda text: text[:24])
def test_a_planted_mix_up_is_found(train, monkeypatch, name, function, old, new):
    module = import_module(name)
    plant(monkeypatch, module, function, old, new)
    with pytest.raises(RuntimeError, match="two devices"):
        train(name, TRAINED[name])


def plant(monkeypatch, module, function, old, new):
    """Replaces a part of a function's text for the length of a test."""
    text = inspect.getsource(getattr(module, function))
    assert text.count(old) == 1
    planted = {}
    exec(text.replace(old, new), vars(module), planted)
    monkeypatch.setattr(module, function, planted[function])


@pytest.mark.parametrize("name, function, old, new", [
    ("nets.sam", "decode", "4, device=points.device", "4"), ("predict", "to_square", ".to(loaded.device)", ""),
    ("predict", "find_everything", "1, 1], device=iou.device", "1, 1]"),
    ("predict_video", "compose", "zeros(size, device=device)", "zeros(size)")], ids=lambda text: text[:24])
def test_a_mix_up_in_prediction_is_found(predict, data, monkeypatch, name, function, old, new):
    plant(monkeypatch, import_module(name), function, old, new)
    with pytest.raises(RuntimeError, match="two devices"):
        if name == "predict_video":
            predict("train_sam2", SAM2, f"{BOX} --overlay False", name, [data("clips") / "JPEGImages/clip_0000"])
        predict("finetune_sam_decoder", f"{SAM} --train all", ALL)


def test_copies_that_do_not_wait_are_found(cuda):
    x = torch.zeros(3)
    assert pin(x).to(CUDA, non_blocking=True).to("cpu").tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="not pinned"):
        x.to(CUDA, non_blocking=True)
    with pytest.raises(RuntimeError, match="not pinned"):
        x.to(CUDA).to("cpu", non_blocking=True)


@pytest.mark.parametrize("name, options", [("train_efficientsam", ESAM), ("pretrain_sami", SAMI), ("train_sam2", SAM2)])
def test_deterministic_is_refused_where_it_cannot_be(train, monkeypatch, name, options):
    """Without the refusal a gradient raises; of the other scripts the runs above have none that would."""
    with pytest.raises(utils.InputError, match="no deterministic gradient on CUDA"):
        train(name, f"{options} --deterministic --amp off")
    module = import_module(name)
    plant(monkeypatch, module, "main", "if args.deterministic and run.device", "if not 1 and run.device")
    with pytest.raises(RuntimeError, match="has no deterministic gradient"):
        train(name, f"{options} --deterministic --amp off")
