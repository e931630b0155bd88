"""Writing a report: `report.html`, `report.md` and `trials.csv`."""

from pathlib import Path

from raychat.atomic import write_text
from raychat.search.report.contents import ReportContents
from raychat.search.report.markdown import markdown, trials_csv
from raychat.search.report.page import html_page


def write_report(contents: ReportContents, folder: Path) -> list[Path]:
    """Write the files into `folder`, each whole or not at all; makes the folder. Returns their paths, the page first.

    The page is written in ASCII, so that no locale and no server can spoil it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (
        ("report.html", html_page(contents).encode("ascii", "xmlcharrefreplace").decode()),
        ("report.md", markdown(contents)),
        ("trials.csv", trials_csv(contents)),
    ):
        write_text(folder / name, text)
        written.append(folder / name)
    return written
