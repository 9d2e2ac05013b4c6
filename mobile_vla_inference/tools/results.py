"""What every subcommand does with its results: JSON files, and warnings on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mobile_vla_inference.atomic import write_text_atomically


def write_json(path: Path | None, content: Any) -> None:
    """Write JSON, UTF-8; the file is replaced as a whole. None: nothing is written."""
    if path is not None:
        write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def warn(*sentences: str) -> None:
    """Print a line for each warning to stderr."""
    for sentence in sentences:
        print(f"mobile_vla: warning: {sentence}", file=sys.stderr)
