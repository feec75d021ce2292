"""Three training scripts that nobody wrote for this package, with their AdamW, with the default rule and with `light`.

The scripts are not part of this repository: ``--scripts`` is a folder with a checkout of each, at the commit in
`SCRIPTS`; ``--data`` a folder with CIFAR-10 as images (``train/CLASS/*.jpg``, ``test/CLASS/*.jpg``) and
``cal_housing.data`` (California housing, StatLib). In a copy of the script, the one line that makes the optimizer is
replaced; everything else is its own command line or configuration. Runs whose result is in ``--out`` are left out::

    python benchmarks/in_the_wild.py --scripts FOLDER --data FOLDER --out benchmarks/results/in_the_wild.json

docs/in_the_wild.md has the tables, which ``--tables`` prints.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Result = dict[str, Any]
LEARNED, LIGHT = "LearnedOptimizer", "LearnedOptimizer, rule='light'"
RESNET_IMAGES = (160, 50)
"""Of each class, to train and to validate: 25 steps of 64 in an epoch."""


@dataclass(frozen=True)
class Script:
    repository: str
    commit: str
    folder: str
    """Under ``--scripts``; the script is run there."""
    file: str
    changed_file: str
    marker: str
    """What is found in one line only of ``changed_file``: the one that makes the optimizer."""
    replacement: str
    arguments: str
    """Of the command line; ``{opt}`` and ``{lr}`` are the optimizer's, ``{data}`` and ``{work}`` folders."""
    optimizers: dict[str, tuple[str, float]]
    """What the script's own options for the optimizer and its learning rate are set to."""
    seeds: tuple[int, ...]
    prepare: Callable[[Path, Path, str, float, int], None]
    """Writes what the script reads: data folder, work folder, optimizer, learning rate, seed."""
    read: Callable[[str, Path], Result]
    columns: tuple[tuple[str, str], ...]
    """Key in the result and heading."""


def main() -> None:
    if sys.argv[1:2] == ["--launch"]:
        return launch(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/in_the_wild.json"))
    parser.add_argument("--only", nargs="+", choices=sorted(SCRIPTS), default=sorted(SCRIPTS))
    parser.add_argument("--optimizers", nargs="+", help="some of the rows only")
    parser.add_argument("--tables", action="store_true", help="print the tables of --out, run nothing")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    if options.tables:
        return print_tables(results["runs"])
    if options.scripts is None or options.data is None:
        parser.error("to run the scripts, say where they and their data are: --scripts FOLDER --data FOLDER")
    done = {(run["script"], run["optimizer"], run["seed"]) for run in results["runs"]}
    rows = ((seed, name) for seed in range(3) for name in options.only if seed in SCRIPTS[name].seeds)
    for seed, name in rows:
        script = SCRIPTS[name]
        for optimizer in [*script.optimizers, LIGHT, LEARNED]:
            if (name, optimizer, seed) in done or optimizer not in (options.optimizers or [optimizer]):
                continue
            print(name, optimizer, seed, flush=True)
            run = run_script(script, optimizer, seed, options.scripts.resolve(), options.data.resolve())
            results["runs"].append({"script": name, "optimizer": optimizer, "seed": seed, **run})
            partial = options.out.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(partial, options.out)
            print(f"  {run}", flush=True)


def run_script(script: Script, optimizer: str, seed: int, scripts: Path, data: Path) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        work, source = Path(temporary, "work"), Path(temporary, "source")
        work.mkdir()
        shutil.copytree(scripts / script.folder, source, ignore=shutil.ignore_patterns(".git", "output"))
        opt, lr = script.optimizers.get(optimizer, next(iter(script.optimizers.values())))
        if optimizer in (LEARNED, LIGHT):
            call = script.replacement if optimizer == LEARNED else f"{script.replacement[:-1]}, rule='light')"
            change_optimizer(source / script.changed_file, script.marker, call)
        script.prepare(data, work, opt, lr, seed)
        arguments = script.arguments.format(opt=opt, lr=lr, seed=seed, work=work, data=data).split()
        record = Path(temporary, "record.json")
        # The checkpoints of these scripts hold objects of their own, which torch.load refuses since 2.6.
        environment = os.environ | {"PROJECT_DIR": str(source), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        paths = [str(source), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        command = [sys.executable, __file__, "--launch", str(record), str(seed), str(source / script.file), *arguments]
        process = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if process.returncode:
            raise SystemExit(f"{process.stdout[-2000:]}\n{process.stderr[-4000:]}")
        said = process.stderr.replace(temporary, "").replace(str(data), "").splitlines()
        warnings = sorted({re.sub(r"^.*?(\w*Warning:)", r"\1", line) for line in said if "Warning:" in line})
        return {**script.read(process.stdout, work), **json.loads(record.read_text()), "warnings": warnings}


def change_optimizer(file: Path, marker: str, replacement: str) -> None:
    """Replace the line that has ``marker`` by ``replacement``, and import what that needs."""
    lines = file.read_text().splitlines()
    found = [number for number, line in enumerate(lines) if marker in line]
    if len(found) != 1:
        raise SystemExit(f"{file.name} has {len(found)} lines with {marker!r}: is it the commit that is named here?")
    indent = re.match(r" *", lines[found[0]]).group()  # type: ignore[union-attr]
    lines[found[0]] = f"{indent}from learnedopt import {LEARNED}\n{indent}{replacement}"
    file.write_text("\n".join(lines) + "\n")


def launch(record: Path, seed: int, argv: list[str]) -> None:
    """Run a script as ``python argv`` would, seeded, and write its number of steps and their median processor time."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    torch.manual_seed(seed)
    started: list[float] = []
    ended: list[float] = []
    settings: Result = {}

    def before(optimizer: Any, args: Any, kwargs: Any) -> None:
        started.append(time.process_time())

    def after(optimizer: Any, args: Any, kwargs: Any) -> None:
        ended.append(time.process_time())
        group = optimizer.param_groups[0]
        settings.update({key: group[key] for key in ("lr", "weight_decay", "rule", "rule_sha256") if key in group})

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)
    sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
    begin = time.perf_counter()
    runpy.run_path(argv[0], run_name="__main__")
    record.write_text(
        json.dumps(
            {
                "settings": settings,
                "torch": torch.__version__,
                "steps": len(ended),
                "seconds": round(time.perf_counter() - begin, 1),
                "processor_seconds": round(time.process_time(), 1),
                "step_ms": 1e3 * statistics.median(later - end for end, later in itertools.pairwise(ended)),
                "optimizer_ms": 1e3 * statistics.median(e - s for s, e in zip(started, ended, strict=True)),
            }
        )
    )


def print_tables(runs: list[Result]) -> None:
    for name, script in SCRIPTS.items():
        columns = [*script.columns, ("step_ms", "ms per step"), ("optimizer_ms", "of which optimizer")]
        print(f"\n{name}\n\n| | {' | '.join(heading for _, heading in columns)} | seeds |")
        print("|---" + "|--:" * (len(columns) + 1) + "|")
        for optimizer in [*script.optimizers, LIGHT, LEARNED]:
            mine = [run for run in runs if run["script"] == name and run["optimizer"] == optimizer]
            if mine:
                values = [[run[key] for run in mine if key in run] for key, _ in columns]
                means = [f"{statistics.mean(of_key):.3g}" if of_key else "?" for of_key in values]
                print(f"| {optimizer} | {' | '.join(means)} | {len(mine)} |")


def nothing(data: Path, work: Path, opt: str, lr: float, seed: int) -> None:
    pass


def prepare_images(data: Path, work: Path, opt: str, lr: float, seed: int) -> None:
    """The first images of each class, as links."""
    for source, target, count in (("train", "train", RESNET_IMAGES[0]), ("test", "val", RESNET_IMAGES[1])):
        for folder in sorted((data / source).iterdir()):
            (work / target / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                (work / target / folder.name / file.name).symlink_to(file)


def prepare_housing(data: Path, work: Path, opt: str, lr: float, seed: int) -> None:
    """California housing in the sizes of the paper, quantiles of features made normal, and the configuration.

    Features are those of ``sklearn.datasets.fetch_california_housing``. The script's own normalisation is the same
    but for a little noise; scikit-learn refuses its call (``subsample`` is a float there).
    """
    from sklearn.preprocessing import QuantileTransformer

    table = np.loadtxt(data / "cal_housing.data", delimiter=",")
    longitude, latitude, age, rooms, bedrooms, population, households, income, value = table.T
    per_household = [rooms / households, bedrooms / households, population, population / households]
    features = np.stack([income, age, *per_household, latitude, longitude], 1)
    sizes = {"train": 13209, "val": 3303, "test": 4128}
    rows = np.split(np.random.default_rng(0).permutation(len(table)), np.cumsum([*sizes.values()])[:-1])
    quantiles = QuantileTransformer(output_distribution="normal", n_quantiles=440, subsample=None)
    quantiles.fit(features[rows[0]])
    for part, index in zip(sizes, rows, strict=True):
        np.save(work / f"N_{part}.npy", quantiles.transform(features[index]).astype(np.float32))
        np.save(work / f"y_{part}.npy", value[index] / 1e5)
    info = {"task_type": "regression", "n_num_features": 8, "n_cat_features": 0}
    (work / "info.json").write_text(json.dumps(info))
    (work / "config.toml").write_text(
        f"""seed = {seed}
[data]
path = '{work}'
y_policy = 'mean_std'
[model]
d_layers = [510, 263, 363]
dropout = 0.1973063643675128
[training]
batch_size = 256
eval_batch_size = 8192
lr = {lr}
n_epochs = 12
optimizer = '{opt}'
patience = 16
weight_decay = 0.0001516844843295177
"""
    )


def read_resnet(output: str, work: Path) -> Result:
    losses = re.findall(r"Epoch: .*loss: [\d.]+ \(([\d.naif]+)\)  acc1: [\d.]+ \(([\d.]+)\)", output)
    loss, accuracy = losses[-1]
    validation = re.findall(r"Test:  ?Acc@1 ([\d.]+)", output)[-1]
    return {"train_loss": float(loss), "train_accuracy": float(accuracy), "val_accuracy": float(validation)}


def read_makemore(output: str, work: Path) -> Result:
    train, test = re.findall(r"step \d+ train loss: (\S+) test loss: (\S+)", output)[-1]
    return {"train_loss": float(train), "test_loss": float(test)}


def read_mlp(output: str, work: Path) -> Result:
    metrics = json.loads((work / "output" / "stats.json").read_text())
    last = re.findall(r"^\[train\] loss = (\S+)", output, re.MULTILINE)[-1]
    scores = {f"{part}_rmse": metrics["metrics"][part]["rmse"] for part in ("train", "val", "test")}
    return {"train_loss": float(last), "best_epoch": metrics["best_epoch"], **scores}


def adamw(*lrs: float, own: float | None = None) -> dict[str, tuple[str, float]]:
    """Rows of AdamW: the script's own learning rate first."""
    rows = {} if own is None else {f"AdamW, {own:.2g}, the script's own": ("adamw", own)}
    return rows | {f"AdamW, {lr:g}": ("adamw", lr) for lr in lrs}


SCRIPTS = {
    "resnet18": Script(
        repository="pytorch/vision",
        commit="bf01bab6125c5f1152e4f336b470399e52a8559d",
        folder="vision/references/classification",
        file="train.py",
        changed_file="train.py",
        marker="torch.optim.AdamW(",
        replacement=f"optimizer = {LEARNED}(parameters)",
        arguments="--data-path {work} --model resnet18 --device cpu --batch-size 64 --epochs 6 --workers 0 "
        "--print-freq 1 --train-crop-size 32 --val-resize-size 32 --val-crop-size 32 --output-dir {work} "
        "--opt {opt} --lr {lr}",
        optimizers=adamw(1e-3, 3e-4, 3e-3) | {"SGD, 0.1, the script's own": ("sgd", 0.1)},
        seeds=(0,),
        prepare=prepare_images,
        read=read_resnet,
        columns=(
            ("train_loss", "training loss, last epoch"),
            ("train_accuracy", "training accuracy, %"),
            ("val_accuracy", "validation accuracy, %"),
        ),
    ),
    "makemore": Script(
        repository="karpathy/makemore",
        commit="988aa59e4d8fefa526d06f3b453ad116258398d4",
        folder="mm",
        file="makemore.py",
        changed_file="makemore.py",
        marker="torch.optim.AdamW(",
        replacement=f"optimizer = {LEARNED}(model.parameters())",
        arguments="--max-steps 501 --num-workers 0 --work-dir {work}/out --learning-rate {lr} --seed {seed}",
        optimizers=adamw(1e-3, 3e-3, own=5e-4),
        seeds=(0, 1),
        prepare=nothing,
        read=read_makemore,
        columns=(("train_loss", "training loss"), ("test_loss", "test loss")),
    ),
    "tabular-mlp": Script(
        repository="yandex-research/rtdl-revisiting-models",
        commit="e3ed46cac38568785289d8fa16b8cfa585bde27e",
        folder="rtdl",
        file="bin/mlp.py",
        changed_file="lib/deep.py",
        marker="return Optimizer(parameter_groups",
        replacement=f"return {LEARNED}(parameter_groups)",
        arguments="{work}/config.toml -o {work}/output",
        optimizers=adamw(3e-4, 3e-3, own=0.001304086404538407),
        seeds=(0, 1, 2),
        prepare=prepare_housing,
        read=read_mlp,
        columns=(
            ("train_loss", "training loss, last epoch"),
            ("train_rmse", "training RMSE"),
            ("val_rmse", "validation RMSE"),
            ("test_rmse", "test RMSE"),
            ("best_epoch", "best epoch"),
        ),
    ),
}

if __name__ == "__main__":
    main()
