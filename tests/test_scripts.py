"""All scripts alike: one shape, one spelling of options, one body for functions of one name; each runs alone."""
import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import utils
from conftest import QUIET, ROOT

TRAINING = sorted(path.stem for path in ROOT.glob("*.py") if re.match("train_|finetune_|pretrain_", path.stem))
SCRIPTS = [*TRAINING, "predict"]
TOOLS = ["annotate", "convert_labels", "predict_video"]
NETS = {"train_unet": "unet", "train_deeplabv3": "deeplabv3", "train_efficientsam": "efficient_sam",
        "train_efficientsam_ddp": "efficient_sam", "finetune_sam_decoder": "sam", "train_sam2": "sam2",
        "pretrain_sami": "sami"}
DATA_KIND = {"train_unet": "cells", "train_deeplabv3": "scenes", "train_efficientsam": "objects",
             "train_efficientsam_ddp": "objects", "finetune_sam_decoder": "rings", "train_sam2": "clips",
             "pretrain_sami": "objects"}
SMALL = {"train_unet": [], "train_deeplabv3": ["--backbone", "mobilenet_v3_large", "--weights", "none",
                                               "--base-size", "64", "--crop-size", "64"],
         "finetune_sam_decoder": ["--model", "demo", "--weights", "none", "--image-size", "64", "--year", "2012"],
         "train_sam2": ["--model", "demo", "--image-size", "64", "--num-frames", "2"],
         "pretrain_sami": ["--model", "demo", "--teacher", "demo", "--teacher-weights", "none", "--teacher-size", "64",
                           "--image-size", "64", "--decoder-dim", "32", "--decoder-depth", "1"],
         **dict.fromkeys(["train_efficientsam", "train_efficientsam_ddp"], ["--model", "demo", "--image-size", "64"])}
SECTIONS = ["Options", "Data", "Model", "Loss", "Evaluation", "Training", "Main"]
FUNCTIONS = ["get_args_parser", "create_loaders", "create_model", "criterion", "evaluate", "train_one_epoch", "main"]
ALLOWED = {"torch", "torchvision", "monai", "cv2", "numpy", "PIL", "matplotlib", "tqdm", "pytest"}
# Functions that have one name in several scripts and differ because the articles do.
DIFFERING = {"get_args_parser", "find_items", "read_item", "check_item", "create_loaders",
             "sanity_check", "create_model", "criterion", "count_pixels", "scores", "evaluate", "draw_samples",
             "print_table", "create_optimizer", "learning_rate", "set_learning_rate", "train_one_epoch", "main",
             "prepare_demo", "read_image", "mask_iou", "draw_prompts", "encode", "count_trained"}
ARTICLES = {  # their defaults; SAM 2's are in docs/sam2_options.md
    "train_unet": dict(epochs=100, batch_size=16, model="NestedUNet", deep_supervision=False, image_size=(96, 96),
                       input_channels=3, num_classes=1, loss="BCEDiceLoss", optimizer="SGD", lr=1e-3, momentum=0.9,
                       weight_decay=1e-4, nesterov=False, scheduler="CosineAnnealingLR", min_lr=1e-5, factor=0.1,
                       patience=2, milestones=(1, 2), gamma=2 / 3, early_stopping=-1, seed=41),
    "train_deeplabv3": dict(num_classes=20, aux=True, batch_size=4, epochs=30, lr=1e-4, momentum=0.9,
                            weight_decay=1e-4, base_size=520, crop_size=480),
    "train_efficientsam": dict(epochs=10, batch_size=4, bbox_shift=5, lr=5e-5, weight_decay=0.01, image_size=1024,
                               iou_loss_weight=1, seg_loss_weight=1, ce_loss_weight=1, scheduler="plateau"),
    "train_efficientsam_ddp": dict(epochs=1000, batch_size=4, bbox_shift=10, lr=5e-4, weight_decay=0.01,
                                   image_size=1024, bucket_cap_mb=25),
    "finetune_sam_decoder": dict(year="2007", epochs=100, batch_size=1, lr=1e-4, min_lr=1e-7, weight_decay=5e-4,
                                 points=1, point_prompt=True, box_prompt=True, model="vit_b", image_size=1024)}
RECIPE = ["--data-path", "--weights", "--epochs", "--batch-size", "--accumulate", "--lr", "--weight-decay"]
STORY = ["utils.Run", "create_loaders", "sanity_check", "create_model", "run.describe", "run.check_test",
         "create_optimizer", "run.start", "run.saved_when_stopped", "run.is_over", "train_one_epoch", "evaluate",
         "run.end_epoch", "run.is_best", "run.save_best", "run.save_last", "run.plot_curves",
         "draw_samples", "run.finish"]


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def definitions(name):
    """{function or class name: its code without comments} of a script."""
    nodes = [node for node in tree(name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.unparse(node) for node in nodes}


def actions(name):
    parser = import_module(name).get_args_parser()
    return {option: action for action in parser._actions for option in action.option_strings}



@pytest.mark.parametrize("name", ARTICLES)
def test_defaults_are_the_articles(name):
    args = vars(import_module(name).get_args_parser().parse_args([]))
    assert {key: args[key] for key in ARTICLES[name]} == ARTICLES[name]

@pytest.mark.parametrize("name", TRAINING)
def test_sections_stand_in_order(name):
    text = (ROOT / f"{name}.py").read_text()
    assert re.findall(r"^# --- (.*) ---$", text, re.M) == SECTIONS
    assert [word for word in re.findall(r"^def (\w+)", text, re.M) if word in FUNCTIONS] == FUNCTIONS


@pytest.mark.parametrize("name, sections", [
    ("predict", ["Options", "Data", "Model", "Prediction", "Main"]),
    ("predict_video", ["Options", "Frames", "Prompts", "Model", "Tracking", "Evaluation", "Main"]),
    ("annotate", ["Options", "Model", "Objects", "Server", "Main"])])
def test_predict_and_annotate_have_their_own_sections(name, sections):
    assert re.findall(r"^# --- (.*) ---$", (ROOT / f"{name}.py").read_text(), re.M) == sections


def test_annotate_takes_the_nets_and_the_devices_as_predict_does():
    reference, ours = actions("predict"), actions("annotate")
    for option in ("--device", "--amp", "--base"):
        assert (ours[option].help, ours[option].default) == (reference[option].help, reference[option].default)
    assert ours["--model"].choices == ours["--compare-model"].choices == reference["--model"].choices[3:]


def test_functions_of_one_name_have_one_body():
    seen = {}
    for name in [*SCRIPTS, "predict_video", "annotate"]:
        for function, code in definitions(name).items():
            if function not in DIFFERING:
                other, first = seen.setdefault(function, (name, code))
                assert code == first, f"{function} differs between {other}.py and {name}.py"


@pytest.mark.parametrize("name", TRAINING)
def test_main_tells_the_story_in_order(name):
    """The last call of each, as what --test-only and the starting weights need comes before the loop."""
    (main,) = [node for node in tree(name).body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    calls = [ast.unparse(node.func) for node in ast.walk(main) if isinstance(node, ast.Call)]
    assert set(STORY) <= set(calls)
    text = ast.unparse(main)
    places = [text.rindex(f"{call}(") for call in STORY if call not in ("evaluate", "sanity_check", "run.save_best")]
    assert places == sorted(places)
    loop = text[text.index("run.is_over()"):]
    order = [loop.index(call) for call in ("train_one_epoch(", "evaluate(", "run.end_epoch(", "save_best")]
    assert order == sorted(order)


@pytest.mark.parametrize("name", TRAINING)
def test_the_article_s_parts_are_mapped_to_functions_that_are_there(name):
    parts = import_module(name).__doc__.split("Parts:  the article's, and here: ")[1]
    code = "".join(path.read_text() for path in [ROOT / f"{name}.py", ROOT / "utils.py", *ROOT.glob("nets/*.py")])
    ours = [side for part in parts.split(";") for side in part.partition("=")[2].split()]
    words = [word.strip(",.") for word in ours]
    found = [word for word in words if re.search(rf"(def|class) {word.removeprefix('utils.')}\b", code)]
    assert len(found) >= 3 and {word for word in words if "_" in word} <= {*found}


@pytest.mark.parametrize("name", TRAINING)
def test_pictures_say_what_their_colours_mean(name, tmp_path, monkeypatch):
    import demo_data
    legends = []
    monkeypatch.setattr(utils, "save_panel", lambda path, rows, titles, legend: legends.append(legend))
    demo_data.write(DATA_KIND[name], tmp_path / "data", 6)
    words = ["--data-path", tmp_path / "data", "--sanity-check", "--device", "cpu", "-j", 0, *SMALL[name]]
    script = import_module(name)
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))
    assert len(legends) == 1 and bool(legends[0]) == (name != "train_unet")  # which has one class here
    calls = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]
    panels = [node for node in calls if ast.unparse(node.func) == "utils.save_panel"]
    without = [node for node in panels if len(node.args) < 4]
    assert len(panels) == 2 and len(without) == (name == "train_sam2")  # draws no prompts on its val_samples.png


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_of_another_net_cannot_be_continued(name, tmp_path):
    import demo_data
    demo_data.write(DATA_KIND[name], tmp_path / "data", 6)
    utils.save_checkpoint(tmp_path / "last.pth", {
        "format": utils.FORMAT, "net": "other", "arch": {}, "model": {}, "optimizer": {}, "args": {"weights": "none"},
        "epoch": 0, "step": 0})
    words = ["--data-path", tmp_path / "data", "--output-dir", tmp_path / "run", "--device", "cpu", "-j", 0,
             *SMALL[name], "--resume", tmp_path / "last.pth"]
    script = import_module(name)
    with pytest.raises(utils.InputError, match="--resume .*: holds net other"):
        script.main(script.get_args_parser().parse_args([str(word) for word in words]))


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in ("train_unet", "pretrain_sami")])
def test_from_scratch_a_rate_for_official_weights_is_noted(name, tmp_path, capsys):
    import demo_data
    script = import_module(name)
    demo_data.write(DATA_KIND[name], tmp_path / "data", 6)
    rate = script.DEMO["lr"]
    for lr, noted in ((rate / 20, True), (rate / 5, False)):
        words = ["--data-path", tmp_path / "data", "--output-dir", tmp_path / str(noted), "--epochs", 1, "-b", 4,
                 "--device", "cpu", "-j", 0, "--lr", lr, *SMALL[name]]
        script.main(script.get_args_parser().parse_args([str(word) for word in words]))
        printed = capsys.readouterr().out
        assert (f"note: --lr {lr} suits official weights; from scratch --demo" in printed) == noted
        assert not noted or f"{rate}" in printed.split("from scratch")[1]


@pytest.mark.parametrize("name", TRAINING)
def test_run_is_called_and_calls_no_script(name):
    """The books are kept in utils: no script writes checkpoints of its own, sums over steps or reads the signals."""
    text = (ROOT / f"{name}.py").read_text()
    for word in ("torch.save(", "torch.load(", "isfinite", "unscale_", "perf_counter", "sampler.set_epoch",
                 "torch.manual_seed"):
        assert word not in text, word
    assert "for batches in run.steps(loader):" in text and "if run.finish_gradient(optimizer, loss_sum, " in text
    assert not re.search(r"import (train|finetune|predict)", (ROOT / "utils.py").read_text())


@pytest.mark.parametrize("name", TRAINING)
def test_shared_options_have_one_spelling_type_and_help(name):
    reference, ours = actions("train_unet"), actions(name)
    parser = utils.ArgumentParser("x")
    parser.add_run_options("x")
    run_options = [option for action in parser._actions for option in action.option_strings]
    assert len(run_options) >= 16 and {"--demo", "--resume", "--device", "-j", "--amp", "--seed"} <= set(run_options)
    for option in [*run_options, *RECIPE]:
        if option not in ("--data-path", "--weights") and \
                (name, option) not in (("train_sam2", "--batch-size"), ("pretrain_sami", "--lr")):
            # whose help names the layout, the files, that they are clips, and of how many images it is
            assert ours[option].help == reference[option].help, option
        assert getattr(ours[option].type, "__name__", None) == getattr(reference[option].type, "__name__", None), option
    assert {"-b", "-j", "--wd"} <= ours.keys()


@pytest.mark.parametrize("name", [*SCRIPTS, *TOOLS])
def test_every_option_has_a_help_and_help_fits_two_screens(name):
    parser = import_module(name).get_args_parser()
    assert all(action.help for action in parser._actions)
    assert len(parser.format_help().splitlines()) <= 2 * 60


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("nets/*.py")], ids=lambda path: path.name)
def test_imports_are_the_listed_packages_and_nets_import_nothing_of_ours(path):
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
            [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules |= {name.split(".")[0] for name in names}
    ours = {item.stem for item in ROOT.glob("*.py")} | {"nets"}
    foreign = modules - set(sys.stdlib_module_names) - ours - ALLOWED
    assert not foreign
    if path.parent.name == "nets":
        ours = {"nets", "utils"} if path.stem in ("weights", "embeddings") else {"nets"}
        assert modules - set(sys.stdlib_module_names) <= {"torch", "torchvision", "numpy", *ours}
    if path.name == "utils.py":
        assert not any(name.startswith("nets") for name in modules)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("nets/*.py")], ids=lambda path: path.name)
def test_no_habit_that_bit_the_articles(path):
    text = path.read_text()
    for habit in (r"type=bool", r"\.cuda\(", "allow_pickle=True", "weights_only=False", "except:", r"import \*"):
        assert not re.search(habit, text), habit


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("nets/*.py")], ids=lambda path: path.name)
def test_lines_are_short(path):
    lines = path.read_text().splitlines()
    assert all(len(line) <= 120 for line in lines)
    if path.name not in ("benchmark.py", "demo_data.py"):  # which nobody reads beside an article
        assert sum(len(line) > 100 for line in lines) <= 0.05 * len(lines)


def test_tests_keep_within_the_limit():
    for path in Path(__file__).parent.glob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{number}"


def test_importing_a_script_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join([*SCRIPTS, *TOOLS])}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **QUIET})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRAINING)
def test_a_script_copied_with_its_net_and_utils_runs_alone(name, tmp_path, script):
    import demo_data
    (tmp_path / "nets").mkdir()
    for file in (f"{name}.py", "utils.py", *[f"nets/{path.name}" for path in (ROOT / "nets").glob("*.py")]):
        shutil.copy(ROOT / file, tmp_path / file)
    demo_data.write(DATA_KIND[name], tmp_path / "data", 6)
    done = script(f"{name}.py", "--data-path", "data", "--epochs", 1, "-b", 4, "-j", 0, "--device", "cpu", *SMALL[name],
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / name / "best.pth").exists()
    if name != "train_unet":
        return
    done = script(f"{name}.py", "--demo", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "demo_data.py" in done.stderr
