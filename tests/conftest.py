"""One thread, no network, helpers on the path: tests must not depend on who else uses the machine."""

import os
import sys
from pathlib import Path

for key, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}.items():  # fmt: skip
    os.environ.setdefault(key, value)

sys.path.insert(0, str(Path(__file__).parent))
