"""``bocage pretrain recipe=NAME key=value ...``: pretrain one encoder per modality."""

from __future__ import annotations

import argparse
from pathlib import Path

from bocage import recipes
from bocage.ssl.engine.parallel.distributed import is_main
from bocage.ssl.engine.trainer import Outcome
from bocage.ssl.pretrain import RECONSTRUCTIONS_FOLDER, pretrain
from bocage.ssl.pretrain_config import PretrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe=mae_multimodal shards=PATH output=PATH, and any key of the recipe",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.epilog = (
        f"recipes: {', '.join(recipes.recipes_for(PretrainConfig))}\n\n"
        "several GPUs or machines: accelerate launch pretrain.py recipe=... (the same arguments)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Pretrain; return 0, or the exit code of the signal that stopped the run."""
    config = recipes.resolve(PretrainConfig, arguments.overrides)
    if arguments.print_config:
        print(recipes.to_yaml(config), end="")
        return 0
    outcome = pretrain(config)
    if outcome.exit_code == 0 and is_main():
        _print_paths(Path(config.output), outcome)
    return outcome.exit_code


def _print_paths(output: Path, outcome: Outcome) -> None:
    """Print where a finished run wrote its last figures and its encoders."""
    for path in sorted((output / RECONSTRUCTIONS_FOLDER).glob(f"*_step-{outcome.step:07d}.png")):
        print(f"reconstruction: {path}")
    print(f"encoders: {output / 'encoders'}")
