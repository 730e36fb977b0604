"""`python -m lora` is the command `lora`."""

import sys

from lora.cli import main

sys.exit(main())
