"""The report of a search or of a single run: report.html, report.md and trials.csv. Also while it runs.

python jobs/report.py RUN_OR_SEARCH        a model tag, the name of a search, or a folder
python jobs/report.py d4 --output /tmp/d4  elsewhere than in its own folder
python jobs/report.py sweep --with more    a scaling law over the runs of two sweeps, of other sizes of one model
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# A checkout where only the dependencies are installed is enough.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from raychat import cli
from raychat.checks import did_you_mean, require
from raychat.errors import ConfigError
from raychat.search.book import SPEC
from raychat.search.report import ReportContents, write_report
from raychat.search.report.of_run import run_contents
from raychat.search.report.of_search import read_search
from raychat.tracking.run_table import default_base_dir, run_dirs


def main(argv: Sequence[str]) -> int:
    """Find it, read it, write the report and say where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="RUN_OR_SEARCH", help="model tag, name of a search, or folder of either")
    parser.add_argument("--base-dir", type=Path, default=default_base_dir(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the report; default: that of the run")
    parser.add_argument(
        "--with",
        dest="others",
        metavar="SEARCH,...",
        default="",
        help="sweeps whose runs are fitted together with these",
    )
    args = parser.parse_args(argv)
    base_dir = args.base_dir.expanduser()
    folder = find(args.name, base_dir)
    contents = read(folder, [find(name, base_dir) for name in args.others.split(",") if name])
    print(contents.sentence)
    for path in write_report(contents, args.output or folder):
        print(path)
    return 0


def find(name: str, base_dir: Path) -> Path:
    """The folder of the search or run of that name; searches come first.

    Raises:
        ConfigError: there is none, with near names.
    """
    places = [base_dir / "searches" / name, base_dir / "runs" / name, Path(name).expanduser()]
    if found := next((place for place in places if place.is_dir()), None):
        return found
    searches = base_dir / "searches"
    known = [path.name for path in (*run_dirs(base_dir / "runs"), *(searches.iterdir() if searches.is_dir() else ()))]
    hint = did_you_mean(name, known) or "."
    raise ConfigError(
        f"There is no search or run {name!r} in {base_dir}, and no folder of that name{hint} Name one that "
        "`python jobs/runs.py` lists, or its folder."
    )


def read(folder: Path, others: Sequence[Path] = ()) -> ReportContents:
    """What the folder of a search or of a run says. `others` are sweeps that make a law together with this one."""
    if (folder / SPEC).is_file():
        return read_search(folder, others)
    require(not others, f"--with joins sweeps (jobs/search.py --iso-flops), and {folder.name} is a run: leave it out.")
    return run_contents(folder)


if __name__ == "__main__":
    cli.run_job(main)
