"""Examples at the end of ``bocage COMMAND --help``."""

from __future__ import annotations

import argparse

EXAMPLES = {
    "get": """\
bocage get FLAIR-HUB --dry-run
bocage get FLAIR-HUB --workers 8
bocage get data/toy --toy
bocage get FLAIR-HUB --domains D004-2021 D012-2019 --modalities AERIAL_RGBI AERIAL_LABEL-COSIA""",
    "sample": """\
bocage sample FLAIR-HUB --patches 200 --seed 0
bocage sample data/tree --patches 20 --gaps 0.2 --modalities AERIAL_RGBI SENTINEL2_TS AERIAL_LABEL-COSIA""",
    "describe": """\
bocage describe drone
bocage describe drone -o drone.yaml
bocage describe --images drone/images --labels drone/masks --bands R,G,B --classes classes.txt -o drone.yaml""",
    "shard": """\
bocage shard FLAIR-HUB data/shards --workers 32 --dry-run
bocage shard FLAIR-HUB data/shards --workers 32
bocage shard FLAIR-HUB data/aerial --modalities AERIAL_RGBI AERIAL_LABEL-COSIA \\
    --split-domains test=D004-2021 train=rest
bocage shard drone data/drone dataset=drone.yaml --dry-run --picture data/drone.png
bocage shard drone data/drone dataset=drone.yaml
bocage shard --images drone/images --labels drone/masks --bands R,G,B --classes classes.txt data/drone""",
    "verify": """\
bocage verify data/shards --workers 8
bocage verify data/shards --decode all --json data/verify.json""",
    "inspect": """\
bocage inspect data/shards
bocage inspect data/shards --picture data/patch.png""",
    "pretrain": """\
bocage pretrain recipe=mae_multimodal shards=data/shards output=runs/mae
bocage pretrain recipe=quickstart shards=data/shards output=runs/quickstart engine.steps=20
bocage pretrain recipe=mae_multimodal shards=data/shards --print-config""",
    "finetune": """\
bocage finetune recipe=finetune_cosia shards=data/shards output=runs/cosia \\
    encoders.AERIAL_RGBI=runs/mae/encoders/AERIAL_RGBI
bocage finetune recipe=finetune_lpis shards=data/shards output=runs/lpis train_fraction=0.05 draw=0
bocage finetune recipe=finetune_cosia shards=data/shards --print-config""",
    "evaluate": """\
bocage evaluate runs/cosia data/shards runs/cosia_scores --split split_1 --value test
bocage evaluate runs/cosia data/shards runs/cosia_missing --split split_1 --value test --missing""",
    "predict": """\
bocage predict runs/cosia data/shards runs/cosia_maps --split split_1 --value test --preview 8
bocage predict runs/cosia FLAIR-HUB runs/cosia_maps
bocage predict runs/roofs drone/new_flight runs/roofs_maps
bocage predict runs/roofs drone runs/roofs_maps dataset=drone.yaml""",
    "map": """\
bocage map runs/cosia runs/area --raster AERIAL_RGBI=ortho.vrt
bocage map runs/cosia runs/area --raster AERIAL_RGBI=ortho.vrt SENTINEL2_TS=s2.tif --dates SENTINEL2_TS=dates.txt""",
    "study": "bocage study run --help",
    "study subsets": "bocage study subsets data/shards runs/subsets",
    "study run": """\
bocage study run recipe=label_efficiency shards=data/shards \\
    initializations.ours.AERIAL_RGBI=runs/mae/encoders/AERIAL_RGBI --dry-run
bocage study run recipe=my_study.yaml shards=data/shards --processes 2
bocage study run recipe=my_study.yaml shards=data/shards --slurm runs/study.sh --sbatch gpus=1 time=06:00:00""",
    "study report": """\
bocage study report recipe=label_efficiency shards=data/shards \\
    initializations.ours.AERIAL_RGBI=runs/mae/encoders/AERIAL_RGBI""",
    "study probe": """\
bocage study probe runs/mae/encoders/AERIAL_RGBI data/shards runs/probes/aerial --fraction 0.01
bocage study probe hf:org/name data/shards runs/probes/aerial --label ALL_LABEL-LPIS""",
    "study demo": "bocage study demo",
    "publish": """\
bocage study probe runs/mae/encoders/AERIAL_RGBI data/shards runs/probes/aerial
bocage publish runs/mae runs/published --shards data/shards --modalities AERIAL_RGBI \\
    --scores runs/probes/aerial/knn-* runs/probes/aerial/linear-* --license etalab-2.0
bocage publish runs/mae runs/published --shards data/shards --without-scores --license etalab-2.0 --to hf:org/name \\
    --dry-run""",
    "attention": """\
bocage attention runs/mae/encoders/SENTINEL2_TS data/shards runs/attention --split split_1 --value test --count 8
bocage attention runs/mae/encoders/SENTINEL1-ASC_TS data/shards runs/attention_s1 --count 2""",
    "convert": """\
bocage convert FLAIR-HUB_LC-L.safetensors runs/lc_l --key-report runs/lc_l_keys.txt
bocage convert runs/lc_l/AERIAL_LABEL-COSIA runs/official_again.safetensors""",
    "replay": "bocage replay runs/mae/bad_steps/step-00001234",
    "doctor": """\
bocage doctor
bocage doctor --shards data/shards --output runs""",
    "completion": """\
bocage completion bash > ~/.local/share/bash-completion/completions/bocage
bocage completion zsh > ~/.zfunc/_bocage""",
    "demo": "bocage demo",
}
"""Example command lines by command; ``study run`` is an action of ``study``."""


def add_examples(parser: argparse.ArgumentParser, name: str) -> None:
    """Append the examples of a command to the end of its help."""
    shown = "\n".join(f"  {line}" for line in EXAMPLES[name].splitlines())
    before = f"{parser.epilog.rstrip()}\n\n" if parser.epilog else ""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"{before}examples:\n{shown}"
