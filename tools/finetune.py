"""``bocage finetune recipe=NAME key=value ...``: fine-tune a segmentation model on labels and evaluate it."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from bocage import recipes
from bocage.finetune.finetune_config import FinetuneConfig
from bocage.finetune.train import finetune
from bocage.ssl.engine.parallel.distributed import is_main
from bocage.tools.cli.reports import text_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="recipe=finetune_cosia shards=PATH output=PATH, and any key of the recipe",
    )
    parser.epilog = f"recipes: {', '.join(recipes.recipes_for(FinetuneConfig))}, and official/*"
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune; return 0, or the exit code of the signal that stopped the run."""
    config = recipes.resolve(FinetuneConfig, arguments.overrides)
    if arguments.print_config:
        print(recipes.to_yaml(config), end="")
        return 0
    result = finetune(config)
    if not result["stopped"] and is_main():
        _print_scores(result)
    return int(result["exit_code"])


def _print_scores(result: dict[str, Any]) -> None:
    """Print the scores of a finished run and the paths of its files."""
    console = text_console()
    for label in result["labels"]:
        table = Table(title=f"{label} from {', '.join(result['modalities'])}")
        for name in ("patches of", "count", "mIoU strict", "mIoU official", "OA strict", "OA official"):
            table.add_column(name, justify="left" if name == "patches of" else "right")
        for part in [name for name in ("valid", "test") if name in result]:
            strict, official = result[part][label]["strict"], result[part][label]["official"]
            figures = (strict["miou"], official["miou"], strict["oa"], official["oa"])
            name = f"{part} (trained on)" if part in result["fit_only"] else part
            table.add_row(name, str(result["patches"][part]), *(f"{figure:.2f}" for figure in figures))
        console.print(table)
    for name in ("model", "scores", "picture"):
        if result[name] is not None:
            console.print(f"{name}: {result[name]}", soft_wrap=True, highlight=False)
