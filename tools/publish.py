"""``bocage publish RUN OUT``: write pretrained encoders with model cards, and upload them to the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bocage.shards.errors import InputError

if TYPE_CHECKING:
    from bocage.finetune.publishing.release import PretrainedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.epilog = "--to needs a token (HF_TOKEN or `hf auth login`); without one it prints what it would upload."
    parser.add_argument("pretraining", metavar="RUN", type=Path, help="folder of a finished pretraining")
    parser.add_argument("out", metavar="OUT", type=Path, help="output folder, with one folder per encoder")
    parser.add_argument("--shards", required=True, metavar="SHARDS", help="shards of the pretraining, or their address")
    parser.add_argument("--modalities", nargs="+", metavar="MODALITY", help="encoders to publish (default: all)")
    scores = parser.add_mutually_exclusive_group(required=True)
    scores.add_argument(
        "--scores", nargs="+", type=Path, metavar="FOLDER", help="scores of `bocage study probe` for each encoder"
    )
    scores.add_argument("--without-scores", action="store_true", help="publish without scores; the card says so")
    parser.add_argument(
        "--dataset", metavar="NAME", help="pretraining data, if the shards name others, e.g. for simulated patches"
    )
    parser.add_argument(
        "--data-license", metavar="ID", help="licence of the data, if the shards do not name it, e.g. cc-by-4.0"
    )
    parser.add_argument("--license", required=True, metavar="ID", help="licence of the weights, as the hub writes it")
    parser.add_argument(
        "--to", metavar="hf:ORG/NAME", help="repository to upload to; several encoders get -MODALITY appended"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="with --to: the branch (default: main)")
    parser.add_argument("--public", action="store_true", help="with --to: a new repository is public, not private")
    parser.add_argument("--collection", metavar="TITLE", help="with --to: add the repositories to this collection")
    parser.add_argument("--dry-run", action="store_true", help="with --to: write the folders, upload nothing")


def run(arguments: argparse.Namespace) -> int:
    """Write the folders, upload them and return the exit status."""
    from bocage.finetune.publishing.release import (
        PretrainedRun,
        ReleaseTerms,
        check_publication,
        has_scores,
        publish_encoder,
        read_probe_scores,
        released_dataset,
    )
    from bocage.shards.read.open import open_shards
    from bocage.ssl.encoders.hub import parse_hub_address

    for option in ("revision", "public", "collection", "dry_run"):
        if getattr(arguments, option) and not arguments.to:
            raise InputError(f"--{option.replace('_', '-')} needs --to hf:org/name")
    if arguments.to and parse_hub_address(arguments.to)[1] is not None:
        raise InputError(f"--to {arguments.to}: give the branch as --revision")
    manifest = open_shards(arguments.shards)
    dataset = released_dataset(manifest.dataset, arguments.dataset, arguments.data_license)
    try:
        terms = ReleaseTerms(license=arguments.license, dataset=dataset)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    pretrained = PretrainedRun(arguments.pretraining, manifest)
    modalities = arguments.modalities or pretrained.modalities
    if not modalities or len(set(modalities)) < len(modalities):
        raise InputError(f"--modalities: name encoders of {arguments.pretraining}, each once")
    scores: dict[str, list[Path]] = {modality: [] for modality in modalities}
    for path in arguments.scores or []:
        (modality, *others) = read_probe_scores(path)["modalities"]
        if others or modality not in scores:
            raise InputError(
                f"--scores {path}: scores of {', '.join([modality, *others])}, which is not published here"
            )
        if path.resolve() in {other.resolve() for other in scores[modality]}:
            raise InputError(f"--scores {path}: given twice")
        scores[modality].append(path)
    if arguments.scores and (without := [modality for modality in modalities if not scores[modality]]):
        raise InputError(f"--scores: none for {without[0]}: run `bocage study probe` on it, or leave it out")
    addresses = {modality: _hub_address(arguments, modality, len(modalities)) for modality in modalities}
    for modality in modalities:
        folder = arguments.out / modality
        if not scores[modality] and has_scores(folder):
            print(f"bocage: note: the old card in {folder} had scores, the new one has none", file=sys.stderr)
        try:
            publish_encoder(pretrained, modality, scores[modality], terms, addresses[modality], folder)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}") from error
        check_publication(folder)
        print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        if not arguments.to:
            _link_in_tracker(pretrained, f"published_folder/{modality}", str(folder.resolve()))
    if arguments.to:
        _upload(arguments, pretrained, addresses)
    return 0


def _upload(arguments: argparse.Namespace, run: PretrainedRun, addresses: Mapping[str, str | None]) -> None:
    """Upload each folder and print the URL of its commit; without a token, print what would be uploaded."""
    from bocage.ssl.encoders.hub import add_to_collection, has_token, upload

    visibility = "public" if arguments.public else "private"
    if arguments.dry_run or not has_token():
        for modality, address in addresses.items():
            size = sum(path.stat().st_size for path in (arguments.out / modality).iterdir())
            print(
                f"would upload {arguments.out / modality} to {address}, {visibility} if it is new ({size / 1e6:.1f} MB)"
            )
        if not arguments.dry_run:
            print("no token found: set HF_TOKEN or run `hf auth login`, then run the same command again")
        return
    for modality, address in addresses.items():
        assert address is not None
        message = f"{modality} encoder, {run.state.step:,} steps of {run.description['recipe']}"
        url = upload(arguments.out / modality, address, private=not arguments.public, message=message)
        print(url)
        _link_in_tracker(run, f"published/{modality}", url)
    if arguments.collection:
        uploaded = [address for address in addresses.values() if address is not None]
        print(add_to_collection(arguments.collection, uploaded, private=not arguments.public))


def _link_in_tracker(run: PretrainedRun, name: str, url: str) -> None:
    """Record in the run's W&B or TensorBoard where an encoder was published; a failure only prints a note."""
    from bocage.ssl.engine.logging.trackers import link_afterwards

    engine, state = run.config["engine"], run.state
    try:
        link_afterwards(engine["tracker"], run.folder, engine["project"], state.run, state.step, {name: url})
    except InputError as error:
        print(f"bocage: {error}; the encoder is published nevertheless", file=sys.stderr)


def _hub_address(arguments: argparse.Namespace, modality: str, count: int) -> str | None:
    """Return the hub address of one of ``count`` encoders; None without ``--to``."""
    if not arguments.to:
        return None
    name = arguments.to if count == 1 else f"{arguments.to}-{modality.lower().replace('_', '-')}"
    return f"{name}@{arguments.revision}" if arguments.revision else name
