"""Pretrain encoders: ``accelerate launch pretrain.py recipe=mae_multimodal shards=PATH [key=value ...]``."""

import sys

from bocage.ssl.pretrain import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
