"""The one file a GPU run leaves behind: a JSON object that every stage adds its part to."""

import json
import sys
from pathlib import Path

from fastreg.benchmark.machine import describe


def read(path: Path) -> dict[str, object]:
    """What the file holds so far."""
    return json.loads(path.read_text())


def add(path: Path, stage: str, part: object) -> None:
    """Put ``part`` under ``stage`` in the file, which keeps what other stages have written."""
    document = read(path) if path.exists() else {"machine": describe("cuda")}
    document[stage] = part
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """``gpu_results.py FILE STAGE PART.json``: add a part that another program has written."""
    path, stage, part = sys.argv[1:]
    add(Path(path), stage, json.loads(Path(part).read_text()))


if __name__ == "__main__":
    main()
