"""The command `compress`: from a timm model and a folder of images to smaller models in files.

The dense model is a run like any other: it is trained once, goes on after an interruption, and is
there when the command is called again with another method.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..spec import RunSpec

BATCH = 32
# peak rates of a dense model from pretrained weights, and from random ones
LR, LR_FROM_NOTHING = 3e-4, 1e-3


def add(commands: Any) -> None:
    """Describes the options of the command."""
    parser = commands.add_parser(
        "compress",
        help="train a timm model on a folder of images, make it smaller, compare, and save",
        description="Train a timm model on a folder of images, make it smaller by some methods, "
        "compare accuracy, size and time on the test images, and save each model to a file that "
        "restore() reads.",
    )
    parser.add_argument("--model", required=True, metavar="timm:NAME", help="architecture of timm")
    parser.add_argument(
        "--weights",
        default="timm",
        help="timm (default), none, dinov2-s14-saliency, file:PATH.safetensors or pth:PATH.pth",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
        help="patches of an image that the weights are of, where their file does not say",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER",
        help="class folders or tables, a name under MOE_DATA, hub:owner/name or mnist5k",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="METHOD",
        help="of upcycle, drop, prune, taylor and extract (default: all)",
    )
    parser.add_argument(
        "--active", type=float, default=0.5, help="share of neurons or experts (default: 0.5)"
    )
    parser.add_argument(
        "--epochs",
        type=float,
        default=3.0,
        help="passes that train the dense model (default: 3); 0: its weights are trained, head too",
    )
    parser.add_argument(
        "--tune",
        type=float,
        default=1.0,
        metavar="EPOCHS",
        help="further passes of each model after compression; experts are dropped after them "
        "(default: 1)",
    )
    parser.add_argument(
        "--points", type=float, default=2.0, help="of top-1 that speed may cost (default: 2)"
    )
    parser.add_argument("--size", type=int, help="side of the images (default: as pretrained)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the processor (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="small.safetensors",
        help="the saved model; of several methods small-METHOD.safetensors",
    )
    parser.set_defaults(do=run)


def run(args: argparse.Namespace) -> int:
    """Carries out the command: prints the table, what to make of it, and how to reload."""
    import torch

    from ..api.compress import Rules, checked, compress, listed, refusals, save_all, summary
    from ..inputs.batches import Batches, preprocessing
    from ..inputs.splits import load_splits
    from .collect import model_of

    args.out = args.out.expanduser()
    _check(args)
    methods = checked(args.method)
    rules = Rules(active=args.active, epochs=args.tune, seed=args.seed)
    dense = dense_run(args)
    if dense.train is not None:
        refusals(check_model(dense), methods, rules)  # before it is trained
    model, splits = model_of(dense).to(args.device), load_splits(dense.data)
    torch.set_num_threads(args.threads)
    train, test = Batches(splits.train, dense, BATCH, shuffled=True), Batches(splits.test, dense)
    outcome = compress(model, train, test, methods, rules)
    describes = {
        "class_names": splits.class_names,
        "preprocessing": preprocessing(dense, splits.channels),
    }
    if not outcome.made:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in outcome.refused.items()))
    print(summary(outcome, {}, args.points), flush=True)  # whatever becomes of the files
    print(f"\n{listed(save_all(outcome, args.out, **describes))}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError, in the words of an option, for what would fail after the training."""
    out = args.out
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"-o {out}: models are saved as files that end in .safetensors")
    folder = next(place for place in out.absolute().parents if place.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        what = "cannot be written to" if folder.is_dir() else "is no folder"
        raise ValueError(f"-o {out}: {folder} {what}: name a file in a folder that can be")
    if not 0 < args.active <= 1:
        raise ValueError(f"--active {args.active}: give a share above 0 and at most 1")
    for option in ("epochs", "tune"):
        if not 0 <= (passes := getattr(args, option)) < math.inf:
            raise ValueError(f"--{option} {passes}: give passes over the images, 0 or more")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: give a whole number of at least 0")


def dense_run(args: argparse.Namespace) -> RunSpec:
    """Describes the run of the dense model, and names the folders of data and weights to the
    process.

    Raises FileNotFoundError for a file of weights that is not there, and ValueError for a model
    that timm does not have and for weights without a head where none is trained.
    """
    from pydantic import ValidationError

    from ..spec import sentence

    data, weights = _data(args.data), _weights(args.weights)
    try:
        dense = _described(args, data, weights)
    except ValidationError as error:
        raise ValueError(sentence(error)) from error
    if dense.train is None:
        check_head(dense)
    return dense


def _described(args: argparse.Namespace, data: str, weights: str | None) -> RunSpec:
    from ..spec import PACKAGED, BackboneSpec, DataSpec, RunSpec, TrainSpec

    name = args.model.removeprefix("timm:")
    lr = LR_FROM_NOTHING if weights is None else LR
    return RunSpec(
        study="your_model",
        data=DataSpec(
            name=data,
            image_size=_pretrained_size(name) if args.size is None else args.size,
            augment="shift" if data == PACKAGED else "flip",
        ),
        backbone=BackboneSpec(name=name, weights=weights, grid=args.grid),
        train=TrainSpec(epochs=args.epochs, batch=BATCH, lr=lr) if args.epochs else None,
        seed=args.seed,
        device=args.device,
        threads=args.threads,
    )


def _data(given: str) -> str:
    """Returns the name of a data set; a folder that is there becomes one under MOE_DATA."""
    folder = Path(given).expanduser()
    if not folder.is_dir():  # mnist5k, hub:owner/name, or a name under MOE_DATA
        if folder.is_absolute() or given.startswith("."):
            raise FileNotFoundError(f"--data {given}: no such folder")
        return given
    os.environ["MOE_DATA"] = str(folder.resolve().parent)
    return folder.resolve().name


def _weights(given: str) -> str | None:
    """Returns the name of weights as a run has it; a file gets its SHA-256, so that another file of
    its name makes another run."""
    kind, _, place = given.partition(":")
    if kind not in ("file", "pth"):
        return None if given == "none" else given
    from ..inputs.weights import sha256_file

    path, _, sha256 = place.partition("@")
    file = Path(path).expanduser()
    if not file.is_file():
        file = Path(os.environ.get("MOE_WEIGHTS") or ".").expanduser() / path
    if not file.is_file():
        raise FileNotFoundError(f"--weights {given}: no file {path}, here or under MOE_WEIGHTS")
    os.environ["MOE_WEIGHTS"] = str(file.resolve().parent)
    return f"{kind}:{file.name}@{sha256 or sha256_file(file)}"


def _pretrained_size(name: str) -> int:
    """Reads the side of the images that timm's weights of an architecture were trained with."""
    import timm

    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return 224 if cfg is None else cfg.input_size[-1]


def check_model(dense: RunSpec) -> nn.Module:
    """Returns the model of a run before it is trained.

    Raises ValueError for weights that do not fit it, by name, and images that it does not run on.
    """
    import torch

    from ..api.loaders import check_runs
    from ..inputs.splits import load_splits
    from ..models.backbone import build

    splits, side = load_splits(dense.data), dense.data.image_size
    model = build(dense, len(splits.class_names), splits.channels)
    image = torch.zeros(1, splits.channels, side, side)
    check_runs(model, (image, torch.zeros(1, dtype=torch.long)), f"--data at --size {side}")
    return model


def check_head(dense: RunSpec) -> None:
    """Raises ValueError for a model that is not trained here and whose weights do not fit it, as
    `check_model`, or have no head that fits the classes of the data."""
    from ..models.backbone import heads_of
    from ..models.published import state_for

    model, name = check_model(dense), dense.backbone.weights
    state = {} if name is None else state_for(model, dense.backbone)
    heads = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.startswith(heads_of(model))
    }
    for head, shape in heads.items():
        theirs = tuple(state[head].shape) if head in state else "absent"
        if theirs != shape:
            raise ValueError(
                f"--epochs 0 takes the weights {name} as they are, and they have no head for the "
                f"{shape[0]} classes of {dense.data.name} ({head} is {theirs}, expected {shape}): "
                "give --epochs 1 or more, or weights with such a head"
            )
