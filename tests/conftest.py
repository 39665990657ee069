"""The tests import the stages from the folder above, and the synthetic scans from this one."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
