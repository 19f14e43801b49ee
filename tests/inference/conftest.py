"""Random plans and batches are the engine's: the same strategies that its own tests draw from."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "distributed"))
