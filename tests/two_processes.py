"""Started by test_torchrun.py under torchrun, in two processes: python two_processes.py FOLDER, for all scripts.

FOLDER/jobs.json: {script: options}. Of each script FOLDER/SCRIPT gets `whole` (a run that nothing stopped), `stopped`
(one that a signal to the second process stopped in its second step, then resumed) and figures.json (of --test-only).
"""
import json
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import utils  # noqa: E402
from test_torchrun import freeze_statistics  # noqa: E402

finish_gradient = utils.Run.finish_gradient


def stop_in_second_step(run, *args, **options):
    if (run.progress["epoch"], run.progress["step"], run.rank) == (0, 1, 1):
        utils.remember_signal(signal.SIGTERM, None)
    return finish_gradient(run, *args, **options)


def main(folder):
    torch.set_num_threads(1)
    freeze_statistics(setattr)
    for name, options in json.loads((folder / "jobs.json").read_text()).items():
        script = import_module(name)

        def start(output, *more):
            line = [*options, "--output-dir", str(folder / name / output), *map(str, more)]
            return script.main(script.get_args_parser().parse_args(line))
        start("whole")
        utils.Run.finish_gradient = stop_in_second_step
        try:
            start("stopped")
        except utils.Stopped:
            utils._signals.clear()
        else:
            raise AssertionError(f"{name}: was not stopped")
        utils.wait_for_ranks()  # until the first has saved
        utils.Run.finish_gradient = finish_gradient
        start("stopped", "--resume", "auto")
        if name == "finetune_sam_decoder":  # the second process has no image to validate on
            start("few", "--overfit", 1, "--keep-path", folder / name / "data", "--epochs", 1)
        figures = start("test", "--test-only", "--weights", folder / name / "whole/last.pth")
        (folder / name / f"figures_{utils.ranks()[0]}.json").write_text(json.dumps(figures))
    utils.leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
