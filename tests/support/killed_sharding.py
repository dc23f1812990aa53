"""Run ``bocage shard`` in a way that a test can kill at an exact point, or slow down.

KILL_AT is ``NAME:N:before`` or ``NAME:N:after``: the process group is killed before or after the N-th ``os.replace`` in
one process whose target contains NAME. Worker processes import this script too, so their calls count as well.
SLOWLY is the number of seconds that workers sleep before each patch.
"""

import os
import signal
import sys
import time

from bocage.tools.main import main

NAME, _, REST = os.environ.get("KILL_AT", "").partition(":")
replace, matches = os.replace, 0


def killing_replace(source: str, target: str) -> None:
    global matches
    is_match = NAME in str(target)
    matches += is_match
    number, when = REST.split(":")
    if is_match and matches == int(number) and when == "before":
        os.killpg(0, signal.SIGKILL)
    replace(source, target)
    if is_match and matches == int(number):
        os.killpg(0, signal.SIGKILL)


if NAME:
    os.replace = killing_replace  # type: ignore[assignment]

if os.environ.get("SLOWLY") and __name__ != "__main__":  # in worker processes
    from bocage.shards.write import packing

    encode_patch = packing.encode_patch

    def slow_encode_patch(*arguments: object) -> object:
        time.sleep(float(os.environ["SLOWLY"]))
        return encode_patch(*arguments)  # type: ignore[arg-type]

    packing.encode_patch = slow_encode_patch  # type: ignore[assignment]

if __name__ == "__main__":
    sys.exit(main(["shard", *sys.argv[1:]]))
