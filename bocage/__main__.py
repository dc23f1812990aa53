"""Run ``bocage`` as ``python -m bocage``, which launchers such as torchrun need."""

import sys

from bocage.tools.main import main

if __name__ == "__main__":
    sys.exit(main())
