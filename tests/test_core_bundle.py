"""A CORE bundle is checked before anything is computed, and an archive is unpacked whole or not at all."""

import functools
import hashlib
import io
import json
import random
import re
import stat
import tarfile
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from core_bundles import SHARED, write_bundle, write_items

from raychat.errors import ConfigError, DataError
from raychat.evaluation.core import load_bundle
from raychat.evaluation.core.reference import GPT2


def load(place, tmp_path, lines=None):
    return load_bundle(str(place), tmp_path / "cache", (lines if lines is not None else []).append)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_a_bundle_says_its_tasks_and_knows_every_line(folder, tmp_path):
    bundle = load(folder, tmp_path)
    assert [(t.label, t.kind, t.shots, t.baseline) for t in bundle.tasks] == [
        ("choosing", "multiple_choice", 2, 0.25),
        ("resolving", "schema", 0, 0.5),
        ("continuing", "language_modeling", 1, 0.0),
    ]
    assert [t.delimiter for t in bundle.tasks] == ["\nAnswer: ", " ", " "]
    lines = (folder / "eval_data" / "a" / "choosing.jsonl").read_text().splitlines()
    for item in bundle.tasks[0].items:
        written = json.loads(lines[item.line - 1])
        assert item.options == tuple((written["query"], choice) for choice in written["choices"])
        assert item.gold == written["gold"]


def test_a_cap_takes_the_first_items_of_one_fixed_order(folder, tmp_path):
    whole = load(folder, tmp_path)
    assert sorted(item.line for item in whole.tasks[0].items) == list(range(1, 13))
    assert whole.cut(5).tasks[0].items == whole.tasks[0].items[:5]
    assert whole.cut(5).cut(5) == whole.cut(5)
    assert whole.cut(-1) == whole
    with pytest.raises(ConfigError, match=r"--core-metric-max-per-task=2 is too few.*at least 3"):
        whole.cut(2)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the developer subset of the CORE data is not on this machine")
def test_the_real_bundle_has_22_tasks_of_100_items(tmp_path):
    bundle = load(SHARED, tmp_path)
    assert len(bundle.tasks) == 22
    assert {len(task.items) for task in bundle.tasks} == {32, 100}
    assert {task.label: task.baseline for task in bundle.tasks} == pytest.approx(
        {task.label: GPT2[task.label].baseline for task in bundle.tasks}
    )


def broken(change):
    """The message about a bundle to which `change(folder)` was done."""

    def message(folder, tmp_path):
        change(folder)
        with pytest.raises(DataError) as error:
            load(folder, tmp_path)
        return str(error.value)

    return message


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return broken(change)


def with_line(name, line):
    """One line of a data file, the third, replaced."""

    def change(folder):
        path = folder / "eval_data" / name
        lines = path.read_text().splitlines()
        lines[2] = line if isinstance(line, str) else json.dumps(line)
        path.write_text("\n".join(lines) + "\n")

    return broken(change)


CHOOSING, RESOLVING, CONTINUING = "a/choosing.jsonl", "a/resolving.jsonl", "b/continuing.jsonl"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (edit("core.yaml", "icl_tasks", "tasks"), "icl_tasks"),
        (edit("core.yaml", "icl_tasks:", "icl_tasks: ["), "not YAML"),
        (edit("core.yaml", "label: choosing", "name: choosing"), "without a label"),
        (edit("core.yaml", "label: resolving", "label: choosing"), "choosing twice"),
        (edit("core.yaml", "icl_task_type: schema", "icl_task_type: riddle"), "'riddle'; it must be one of multiple_choice"),
        (edit("core.yaml", "num_fewshot: [2]", "num_fewshot: 2"), "choosing has num_fewshot 2"),
        (edit("core.yaml", "num_fewshot: [2]", "num_fewshot: [12]"), "has 12 items; choosing shows 12"),
        (edit("core.yaml", "a/choosing.jsonl", "../choosing.jsonl"), "path inside eval_data/"),
        (edit("core.yaml", "a/choosing.jsonl", "a/gone.jsonl"), r"lacks .*a/gone\.jsonl"),
        (edit("eval_meta_data.csv", "resolving", "revolving"), "no row for the task resolving"),
        (edit("eval_meta_data.csv", "multiple choice,2,12,25", "multiple choice,2,12,many"), "baseline of choosing is 'many'"),
        (edit("eval_meta_data.csv", "Random baseline", "Baseline"), "no column Random baseline"),
        (broken(lambda folder: (folder / "eval_meta_data.csv").unlink()), r"lacks .*eval_meta_data\.csv"),
        (broken(lambda folder: (folder / "core.yaml").unlink()), r"must hold core\.yaml"),
        (with_line(CHOOSING, "{"), r"choosing\.jsonl .*line 3 is not JSON"),
        (with_line(CHOOSING, "[1]"), "line 3 is not a JSON object"),
        (with_line(CHOOSING, ""), "line 3 is not JSON"),
        (with_line(CHOOSING, {"query": "a", "gold": 0}), "line 3 of .* has no choices"),
        (with_line(CHOOSING, {"query": "a", "choices": "bc", "gold": 0}), "line 3 of .* must be a list of texts"),
        (with_line(CHOOSING, {"query": "a", "choices": ["b", "c"], "gold": 2}), r"line 3 of .* gold is 2; it must be 0\.\.1"),
        (with_line(CHOOSING, {"query": "a", "choices": ["b", "c"], "gold": True}), "gold is True"),
        (with_line(CHOOSING, {"query": 7, "choices": ["b", "c"], "gold": 0}), "query must be text"),
        (with_line(CHOOSING, {"query": "a", "choices": ["b", " "], "gold": 0}), "empty continuation"),
        (with_line(RESOLVING, {"context_options": ["a", 1], "continuation": "c", "gold": 0}), "context_options must be a list"),
        (with_line(CONTINUING, {"context": "a"}), "has no continuation, which language_modeling needs"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_bundle_is_said_with_file_and_line(message, says, folder, tmp_path):
    assert re.search(says, message(folder, tmp_path))


def test_a_place_without_anything_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConfigError, match="only http"):
        load("s3://bucket/bundle.zip", tmp_path)
    with pytest.raises(ConfigError, match="64 hexadecimal"):
        load("http://127.0.0.1/bundle.zip#sha256=abc", tmp_path)


def zipped(folder: Path, top: str = "eval_bundle") -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, f"{top}/{path.relative_to(folder)}")
    return body.getvalue()


def tarred(folder: Path) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as archive:
        archive.add(folder, arcname=".")
    return body.getvalue()


@pytest.fixture
def site(tmp_path):
    """A folder that is served on loopback: (folder, address, paths asked for)."""
    root, asked = tmp_path / "site", []
    root.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield root, f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("name", "pack"), [("b.zip", zipped), ("b.tar.gz", tarred)])
def test_an_archive_is_fetched_once_and_is_the_folder(name, pack, folder, site, tmp_path):
    root, address, asked = site
    (root / name).write_bytes(body := pack(folder))
    digest, lines = hashlib.sha256(body).hexdigest(), []
    plain = load(folder, tmp_path)
    assert load(f"{address}/{name}#sha256={digest}", tmp_path, lines).tasks == plain.tasks
    assert any(digest in line for line in lines)
    requests = len(asked)
    assert load(f"{address}/{name}#sha256={digest}", tmp_path).tasks == plain.tasks
    assert len(asked) == requests
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 2
    assert names[1] == names[0] + ".sha256"
    assert (tmp_path / "cache" / names[1]).read_text().startswith(digest)


def test_an_archive_on_this_machine_is_unpacked_too(folder, tmp_path):
    (tmp_path / "b.zip").write_bytes(zipped(folder))
    assert load(tmp_path / "b.zip", tmp_path).tasks == load(folder, tmp_path).tasks


def evil_tar(member: tarfile.TarInfo) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        archive.addfile(member)
    return body.getvalue()


def evil_zip(name: str, mode: int = 0o644) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    return body.getvalue()


def tar_link() -> bytes:
    member = tarfile.TarInfo("core.yaml")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return evil_tar(member)


@pytest.mark.parametrize(
    "body",
    [
        evil_tar(tarfile.TarInfo("../out")),
        evil_tar(tarfile.TarInfo("/out")),
        tar_link(),
        evil_zip("a/../../out"),
        evil_zip("..\\out"),
        evil_zip("core.yaml", stat.S_IFLNK | 0o777),
    ],
    ids=["tar up", "tar absolute", "tar link", "zip up", "zip up on Windows", "zip link"],
)
def test_links_and_paths_that_lead_outside_are_not_unpacked(body, tmp_path):
    (tmp_path / "b").write_bytes(body)
    with pytest.raises(DataError, match="leads outside"):
        load(tmp_path / "b", tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_wrong_archive_leaves_nothing(folder, site, tmp_path):
    root, address, _ = site
    (root / "page.zip").write_text("<html>not here</html>")
    with pytest.raises(DataError, match="neither a zip nor a tar"):
        load(f"{address}/page.zip", tmp_path)
    body = bytearray(zipped(folder))
    body[100] ^= 0xFF  # inside the first file
    (root / "bad.zip").write_bytes(body)
    with pytest.raises(DataError, match="damaged"):
        load(f"{address}/bad.zip", tmp_path)
    with pytest.raises(DataError, match="404"):
        load(f"{address}/gone.zip", tmp_path)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".part")] == []


def test_two_tasks_may_share_a_file_which_is_read_once(folder, tmp_path):
    text = (folder / "core.yaml").read_text()
    (folder / "core.yaml").write_text(
        text + "- {label: again, dataset_uri: a/choosing.jsonl, num_fewshot: [0], icl_task_type: multiple_choice}\n"
    )
    with (folder / "eval_meta_data.csv").open("a") as file:
        file.write("again,words,multiple choice,0,12,25,,\n")
    bundle = load(folder, tmp_path)
    assert [item.line for item in bundle.tasks[0].items] == [item.line for item in bundle.tasks[3].items]


def test_line_separators_inside_a_text_do_not_end_a_line(folder, tmp_path):
    items = [{"context": f"a\u2028{n}", "continuation": "b\u0085c"} for n in range(5)]
    path = folder / "eval_data" / CONTINUING
    path.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items), encoding="utf-8")
    assert len(load(folder, tmp_path).tasks[2].items) == 5
    write_items(path, items)
    assert len(load(folder, tmp_path).tasks[2].items) == 5


def test_a_password_in_the_address_is_told_nobody(folder, site, tmp_path):
    root, address, _ = site
    (root / "b.zip").write_bytes(zipped(folder))
    lines, secret = [], address.replace("//", "//me:geheim@")
    load(f"{secret}/b.zip?token=geheim", tmp_path, lines)
    with pytest.raises(DataError, match="404") as error:
        load(f"{secret}/gone.zip", tmp_path)
    with pytest.raises(ConfigError) as other:
        load("s3://me:geheim@bucket/b.zip", tmp_path)
    written = [path.read_text() for path in (tmp_path / "cache").glob("*.sha256")]
    assert any("b.zip" in text for text in written)
    assert "geheim" not in "".join([*lines, *written, str(error.value), str(other.value)])


def test_an_archive_with_a_password_or_of_spoilt_xz_is_refused_in_words(folder, tmp_path):
    body = bytearray(zipped(folder))
    entry = body.rindex(b"PK\x01\x02")
    while entry >= 0:  # the flag that says: encrypted
        body[entry + 8] |= 1
        entry = body.rfind(b"PK\x01\x02", 0, entry)
    (tmp_path / "locked.zip").write_bytes(body)
    with pytest.raises(DataError, match="without a password"):
        load(tmp_path / "locked.zip", tmp_path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        member = tarfile.TarInfo("core.yaml")
        member.size = 2**20
        archive.addfile(member, io.BytesIO(random.Random(0).randbytes(2**20)))
    spoilt = bytearray(packed.getvalue())
    spoilt[-100_000:-90_000] = bytes(10_000)
    (tmp_path / "spoilt.tar.xz").write_bytes(spoilt)
    with pytest.raises(DataError, match="damaged"):
        load(tmp_path / "spoilt.tar.xz", tmp_path)
