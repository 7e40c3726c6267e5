"""Measure how LoRACallback works in other frameworks, each in a virtual environment of its own.

python -m tests.frameworks darts lightly    # install, measure, write results/*.json, and make the table anew
python -m tests.frameworks --all            # all of them: some hours on two cores
python -m tests.frameworks --table          # make the table in docs/frameworks.md from the files alone
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from tests.frameworks.table import PAGE, RESULTS, fill

ROOT = PAGE.parents[1]
FRAMEWORKS = {
    "darts": ["darts[torch]"],
    "pytorch-forecasting": ["pytorch-forecasting"],
    "chemprop": ["chemprop"],
    # which it imports, and does not ask for
    "pytorch-tabular": ["pytorch-tabular", "requests"],
    "scvi-tools": ["scvi-tools"],
    "neuralforecast": ["neuralforecast"],
    "gluonts": ["gluonts[torch]"],
    "torchgeo": ["torchgeo", "requests"],  # likewise
    "rl4co": ["rl4co"],
    "lightly": ["lightly"],
    "anomalib": ["anomalib"],
    # a later torchaudio is not for CPUs
    "pyannote-audio": ["torch==2.9.*", "torchaudio==2.9.*", "pyannote-audio"],
    "schnetpack": ["schnetpack>=2.2"],  # for Python 3.12
    "terratorch": ["terratorch"],
    "torch-geometric": ["torch-geometric"],
    "lightning-ir": ["lightning-ir", "transformers<5"],
}
"""What is installed of each.

Its name is that of its package, and of its file in ``cases``.
"""


def measured(name: str, folder: Path) -> None:
    """Install a framework into a folder, unless it is there, and write its file: what it gives, or why it fails."""
    python = folder / "bin" / "python"
    result = RESULTS / f"{name}.json"
    try:
        if not python.exists():
            started(sys.executable, "-m", "venv", str(folder))
            started(
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                *FRAMEWORKS[name],
                "-e",
                str(ROOT),
            )
        print(started(str(python), "-m", "tests.frameworks.measure", name, str(result)))
    except subprocess.CalledProcessError as error:
        print(error.stderr)
        lines = [line for line in error.stderr.splitlines() if "error" in line.lower()]
        # without the folders of this machine
        why = re.sub(r"/\S*/", "", (lines or ["?"])[-1])
        result.write_text(
            json.dumps({"date": date.today().isoformat(), "failed": why}, indent=1)
            + "\n"
        )


def started(*command: str) -> str:
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
    }
    with tempfile.TemporaryDirectory() as folder:  # some write where they are
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, env=env, check=True
        ).stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m tests.frameworks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="framework", help=", ".join(FRAMEWORKS)
    )
    parser.add_argument("--all", action="store_true", help="measure all of them")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument(
        "--keep",
        type=Path,
        help="keep the environments in this folder, and use those that are there",
    )
    asked = parser.parse_args(arguments)
    names = list(FRAMEWORKS) if asked.all else asked.names
    if unknown := set(names) - FRAMEWORKS.keys():
        parser.error(
            f"unknown framework {', '.join(sorted(unknown))}: expected some of "
            f"{', '.join(FRAMEWORKS)}"
        )
    if bool(names) == asked.table:
        parser.error("name frameworks, or --all, or --table")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            measured(name, (asked.keep or Path(folder)) / name)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
