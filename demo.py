"""The command `lora demo`, from a checkout: a 135M model learns to read order notes.

python demo.py                                  # under five minutes on two cores
python demo.py --steps 2 --answers 2            # a smoke test, half a minute
"""

from __future__ import annotations

import sys

from lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
