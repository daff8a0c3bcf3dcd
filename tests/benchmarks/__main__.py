"""Run the benchmarks: ``python -m tests.benchmarks [NAME ...] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from tests.benchmarks.measured import BENCHMARKS
from tests.benchmarks.timing import Row, progress, table


def main() -> None:
    """Print one Markdown table a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones (all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for name in arguments.names or BENCHMARKS:
        start = time.process_time()
        measured = BENCHMARKS[name]()
        rows += measured
        print(table(f"{name}: {BENCHMARKS[name].__doc__}", measured), flush=True)
        progress(f"{name} took {time.process_time() - start:.0f} s of process time")
    if arguments.json:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "clock": "process time"}
        arguments.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
