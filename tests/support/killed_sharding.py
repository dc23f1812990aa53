"""One run of ``bocage shard`` that a test kills or signals; with KILL_AT its own process group dies at an exact point.

KILL_AT is ``NAME:N:before`` or ``NAME:N:after``: before or after the N-th renaming, in one process, of a file whose
name holds NAME. Workers import this script, too, so theirs count as well.
"""

import os
import signal
import sys
import time

from bocage.tools.main import main

NAME, _, REST = os.environ.get("KILL_AT", "").partition(":")
replace, seen = os.replace, 0


def deadly_replace(source: str, target: str) -> None:
    global seen
    hit = NAME in str(target)
    seen += hit
    number, when = REST.split(":")
    if hit and seen == int(number) and when == "before":
        os.killpg(0, signal.SIGKILL)
    replace(source, target)
    if hit and seen == int(number):
        os.killpg(0, signal.SIGKILL)


if NAME:
    os.replace = deadly_replace  # type: ignore[assignment]

if os.environ.get("SLOWLY") and __name__ != "__main__":  # in workers
    from bocage.shards.write import packing

    pack = packing.encode_patch

    def slow_pack(*arguments: object) -> object:
        time.sleep(float(os.environ["SLOWLY"]))
        return pack(*arguments)  # type: ignore[arg-type]

    packing.encode_patch = slow_pack  # type: ignore[assignment]

if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
