"""Pretrain encoders: ``accelerate launch pretrain.py recipe=mae_multimodal shards=PATH [key=value ...]``.

The same as ``bocage pretrain``, as a script for launchers that take one.
"""

import sys

from bocage.tools.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
