"""``bocage convert SRC DST``: checkpoints of the official FLAIR-HUB code to bocage's folders, and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from bocage.finetune.convert import from_official, load_official, save_official, to_official
from bocage.finetune.task import Segmentation, load_segmentation
from bocage.shards.errors import InputError
from bocage.shards.files import written_atomically
from bocage.ssl.encoders.keys import KeyReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="an official checkpoint (.safetensors, .ckpt, .pth), or the output folder of `bocage finetune`",
    )
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="from a checkpoint: a new folder for its encoders and models; from a folder: the .safetensors to write",
    )
    parser.add_argument("--account", metavar="FILE", type=Path, help="write what became of every key")
    own = parser.add_argument_group("from an official checkpoint")
    own.add_argument("--arch", help="its Swin and decoder, e.g. swin_base_patch4_window12_384-upernet (default: told)")
    own.add_argument("--drop-auxiliary", action="store_true", help="leave auxiliary decoders out")


def run(arguments: argparse.Namespace) -> int:
    """Convert, print where things are and the account of the keys."""
    if arguments.source.is_dir():
        if arguments.arch or arguments.drop_auxiliary:
            raise InputError("--arch and --drop-auxiliary read official checkpoints; SRC is a folder")
        model_folder = arguments.source / "model"
        task = load_segmentation(model_folder if model_folder.is_dir() else arguments.source)
        model, report = to_official(task)
        save_official(model, arguments.destination)
        print(f"{arguments.destination}: an official checkpoint")
        _print_inputs(task)
    else:
        model, report = load_official(arguments.source, arch=arguments.arch, auxiliary=not arguments.drop_auxiliary)
        for folder in from_official(model, arguments.destination):
            print(folder)
    print(f"keys: {report}")
    if arguments.account is not None:
        _write(report, arguments.account)
    return 0


def _print_inputs(task: Segmentation) -> None:
    """What the official configuration must say of the inputs, which a checkpoint does not hold."""
    print("the official code has to feed it:")
    for name in task.modalities:
        spec = task.model.encoder(name).spec
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
        print(f"  {name}: {', '.join(spec.channels)} ({spec.representation}); mean {mean}; std {std}")


def _write(report: KeyReport, path: Path) -> None:
    lines = [f"loaded\t{name}" for name in report.loaded]
    lines += [f"{what}\t{name}" for name, what in report.adapted.items()]
    lines += [f"dropped\t{name}" for name in report.dropped]
    lines += [f"missing\t{name}" for name in report.missing]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
