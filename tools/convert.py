"""``bocage convert SRC DST``: checkpoints of the official FLAIR-HUB code to bocage's folders, and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from bocage.finetune.models.segmentation import Segmentation, load_segmentation
from bocage.finetune.official.convert import (
    from_official,
    load_official,
    save_official,
    segmentations,
    to_official,
)
from bocage.shards.errors import InputError
from bocage.shards.files import check_new_folder, written_atomically
from bocage.ssl.encoders.key_report import KeyReport
from bocage.tools.cli.arguments import pairs


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
    own.add_argument(
        "--channels",
        nargs="+",
        default=[],
        metavar="MODALITY=NAMES",
        help="what it reads of a modality, e.g. SPOT_RGBI=R,G,B (default: as the published models, by their number)",
    )
    own.add_argument(
        "--image-size",
        nargs="+",
        default=[],
        metavar="MODALITY=PIXELS",
        help="images to build it for in place of those it was trained on, e.g. AERIAL_RGBI=512",
    )
    own.add_argument(
        "--fixed-size", action="store_true", help="keep extracted Swins as trained, for their one image size"
    )
    own.add_argument("--drop-auxiliary", action="store_true", help="leave auxiliary decoders out")


def run(arguments: argparse.Namespace) -> int:
    """Convert, print where things are and the account of the keys."""
    if arguments.account is not None:
        _check_new_file(arguments.account)
    report = _to_official(arguments) if arguments.source.is_dir() else _from_official(arguments)
    print(f"keys: {report}")
    if arguments.account is not None:
        _write(report, arguments.account)
    return 0


def _to_official(arguments: argparse.Namespace) -> KeyReport:
    if any((arguments.arch, arguments.channels, arguments.image_size, arguments.fixed_size, arguments.drop_auxiliary)):
        raise InputError("SRC is a folder: options about official checkpoints do not apply")
    _check_new_file(arguments.destination)
    model_folder = arguments.source / "model"
    task = load_segmentation(model_folder if model_folder.is_dir() else arguments.source)
    model, report = to_official(task)
    save_official(model, arguments.destination)
    print(f"{arguments.destination}: an official checkpoint, of a model that reads")
    _print_inputs(task)
    return report


def _from_official(arguments: argparse.Namespace) -> KeyReport:
    check_new_folder(arguments.destination)
    model, report = load_official(
        arguments.source,
        arch=arguments.arch,
        image_sizes={name: _pixels(name, text) for name, text in pairs("--image-size", arguments.image_size).items()},
        channels={name: text.split(",") for name, text in pairs("--channels", arguments.channels).items()},
        auxiliary=not arguments.drop_auxiliary,
    )
    for folder in from_official(model, arguments.destination, any_size=not arguments.fixed_size):
        print(folder)
    print("taken to read")
    for task in segmentations(model).values():
        _print_inputs(task)
        break
    return report


def _pixels(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--image-size {name}={text}: {text!r} is not a number of pixels")
    return int(text)


def _check_new_file(path: Path) -> None:
    """Make the file's folder; raise ``InputError`` unless a new file can be made there."""
    if path.exists():
        raise InputError(f"{path} exists: choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _print_inputs(task: Segmentation) -> None:
    """What is fed to each encoder, which a checkpoint does not hold."""
    for name in task.modalities:
        spec = task.model.encoder(name).spec
        if spec.series:
            print(f"  {name}: {', '.join(spec.channels)} as stored")
            continue
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
