"""Credentials in the flags of a search are in none of its files; it goes on with them given again."""

import json
from pathlib import Path

import pytest
from test_search_job import spec_of
from test_steering import Site

from raychat.errors import ConfigError
from raychat.on_ray.search_tracking import _params
from raychat.on_ray.trial_process import TrialEnd
from raychat.search.book import SPEC, Book, read_book, search_dir
from raychat.search.report import write_report
from raychat.search.report.of_search import read_search
from raychat.search.spec_file import read_spec

SECRET = "s3cr3t-pw"
PLACES = {
    "storage_path": f"s3://me:{SECRET}@runs/all?endpoint_override=http://127.0.0.1:1",
    "tracking_uri": f"https://mlflow.example.org/?token={SECRET}",
    "on_event": f"curl -H 'Authorization: {SECRET}' hook.example.org",
}


def spec(base_dir: Path, **places: str):
    base = {"preset": "d4-cpu", "num_iterations": 100, "warmup_ratio": 0.1, "base_dir": str(base_dir)}
    return read_spec({"name": "s", "base": base | PLACES | places, "space": {"depth": [2, 3, 4]}})


def files_with_the_secret(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [path for path in found if SECRET.encode() in path.read_bytes()]


def test_no_credentials_are_in_the_files_of_a_search_nor_told_to_mlflow(tmp_path):
    site = Site(search_dir(tmp_path, "s"), spec(tmp_path))
    order = site.steering.next()
    assert order is not None
    site.steering.ended(order.tag, TrialEnd(exit_code=1, error=f"no s3://me:{SECRET}@runs/all", text="failed"))
    site.book.say_end("stopped")
    site.book.close()
    write_report(read_search(site.book.folder), site.book.folder)
    assert site.book.contents.done[order.tag].reason == "no s3://me:...@runs/all"
    assert files_with_the_secret(tmp_path) == []
    assert SECRET not in json.dumps(_params(site.spec)) + "".join(site.lines)


def test_a_search_goes_on_with_other_credentials_and_from_another_place_in_the_cluster(tmp_path):
    folder = search_dir(tmp_path, "s")
    Book.open(folder, spec(tmp_path)).close()
    for other in ("another-pw", "again"):
        changed = {name: value.replace(SECRET, other) for name, value in PLACES.items()}
        Book.open(folder, spec(tmp_path, **changed, address="10.0.0.1:6379")).close()
    without_user = PLACES["storage_path"].replace(f"me:{SECRET}@", "")  # they are in the environment now
    Book.open(folder, spec(tmp_path, storage_path=without_user)).close()
    with pytest.raises(ConfigError, match=r"base\.storage_path: s3://runs/all\?\S* -> s3://runs/other"):
        Book.open(folder, spec(tmp_path, storage_path="s3://runs/other"))


def test_resume_takes_credentials_and_names_those_that_lack(tmp_path):
    folder = search_dir(tmp_path, "s")
    Book.open(folder, spec(tmp_path)).close()
    resume = ("--base-dir", str(tmp_path), "--resume", "s")
    with pytest.raises(ConfigError) as caught:
        Book.open(folder, spec_of(*resume))
    assert str(caught.value).endswith("--resume NAME -- --storage-path ... --tracking-uri ... --on-event ...")
    given = [f"--{name.replace('_', '-')}={value}" for name, value in PLACES.items()]
    again = spec_of(*resume, "--", *given)
    assert {name: again.base[name] for name in PLACES} == PLACES
    Book.open(folder, again).close()
    with pytest.raises(ConfigError, match="--on-event"):
        Book.open(folder, spec_of(*resume, "--", *given[:2]))
    with pytest.raises(ConfigError, match=r"base\.depth: default -> 5"):
        Book.open(folder, spec_of(*resume, "--", *given, "--depth", "5"))
    assert "depth" not in read_book(folder)[0].base
    assert SECRET not in (folder / SPEC).read_text()


def test_a_space_may_not_hold_credentials(tmp_path):
    base = {"preset": "d4-cpu", "val_corpus": "embedded"}
    with pytest.raises(ConfigError, match="may not hold credentials") as caught:
        read_spec({"name": "s", "base": base, "space": {"corpus": ["embedded", f"s3://me:{SECRET}@texts"]}})
    assert SECRET not in str(caught.value)
