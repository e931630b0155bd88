"""`jobs/sample.py`: what a model writes arrives whole, from flags, a pipe and a terminal."""

import importlib.util
import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import run_here

from raychat import cli
from raychat.config import Config
from raychat.errors import ConfigError
from raychat.export.source import find_source
from raychat.model import generation

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "jobs" / "sample.py"


@pytest.fixture(scope="module")
def job():
    """jobs/sample.py as a module."""
    spec = importlib.util.spec_from_file_location("sample_job", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def where(tiny_flags, prepared_base, tmp_path_factory):
    """Flags that name a run of four steps which has ended."""
    storage = str(tmp_path_factory.mktemp("kept") / "runs")
    own = {"base_dir": str(prepared_base), "storage_path": storage, "model_tag": "tiny"}
    run_here(Config.from_flat(tiny_flags | own))
    return ["--base-dir", str(prepared_base), "--storage-path", storage, "--device-type", "cpu"]


@pytest.fixture(scope="module")
def loaded(where):
    return find_source(base_dir=where[1], storage_path=where[3]).load(torch.device("cpu"))


@pytest.fixture
def run(job, where, monkeypatch, capsys):
    """Runs the job in this process; gives exit code, stdout and stderr."""

    def call(*flags, stdin=""):
        monkeypatch.setattr(sys, "argv", ["jobs/sample.py", *where, *flags])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.run_job(job.main)
        return end.value.code, *capsys.readouterr()

    return call


def continued(loaded, prompt, max_tokens, sampling=generation.LIKELIEST):
    """The text that the library writes."""
    tokenizer = loaded.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    never = set(tokenizer.special_tokens.values()) - {tokenizer.bos_id}
    steps = generation.generate(loaded.model, [ids], max_tokens, sampling, stop={tokenizer.bos_id}, never=never)
    return tokenizer.decode(ids[1:] + generation.continuations(steps, 1)[0])


def test_a_prompt_is_continued_by_a_process_of_its_own(where, loaded):
    command = [sys.executable, str(SCRIPT), *where, "--prompt", "kalo mi", "--max-tokens", "9", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, cwd="/", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == continued(loaded, "kalo mi", 9) + "\n"
    said = done.stderr.decode().splitlines()
    assert said[0].startswith("model: tiny, step 4 (")
    assert said[0].endswith("| cpu, float32")
    assert re.fullmatch(r"prompt: \d+ tokens, [\d,]+ tok/s \| text: 9 tokens, [\d,]+ tok/s", said[1])
    assert len(said) == 2


def test_a_terminal_is_asked_line_by_line_until_ctrl_d(where, loaded):
    command = [sys.executable, str(SCRIPT), *where, "--max-tokens", "9", "--temperature", "0"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(theirs)
    shown = b""
    try:
        for typed in (b"kalo mi\n", b"\n", b"ster\n", b"\x04"):
            while not shown.endswith(b"> "):
                shown += os.read(ours, 1000)
            os.write(ours, typed)
            shown += os.read(ours, len(typed))  # the echo, so that the next prompt sign is waited for
        assert process.wait(timeout=60) == 0, process.stderr.read()
        for prompt in ("kalo mi", "ster"):
            text = continued(loaded, prompt, 9).replace("\n", "\r\n")
            assert re.search(re.escape(prompt) + r"\r\n.*" + re.escape(text[-3:]), shown.decode(), re.DOTALL)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(ours)


def test_the_prompt_sign_is_not_among_texts_that_go_to_a_file(job, monkeypatch, capsys):
    typed = iter(["one", "two"])

    def asked(sign):
        sys.stdout.write(sign)
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", asked)
    assert list(job.typed_lines()) == ["one", "two"]
    assert capsys.readouterr() == ("", "> > > \n")


def test_without_a_prompt_and_without_stdin_there_is_a_message(job, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="Give --prompt"):
        job.converse(None)


def test_a_pipe_is_read_line_by_line_and_empty_lines_ask_nothing(run, loaded):
    code, out, err = run("--max-tokens", "5", "--temperature", "0", stdin="kalo\n\nmi\r\nster")
    assert code == 0
    assert out == "".join(continued(loaded, prompt, 5) + "\n" for prompt in ("kalo", "mi", "ster"))
    assert err.count("tok/s") == 2 * 3


def test_samples_of_one_prompt_have_seeds_of_their_own(run, loaded):
    code, out, _ = run("--prompt", "lo", "--num-samples", "3", "--max-tokens", "6", "--top-k", "-1", "--seed", "7")
    texts = [continued(loaded, "lo", 6, generation.Sampling(temperature=0.8, seed=seed)) for seed in (7, 8, 9)]
    assert code == 0
    assert out == f"{texts[0]}\n--- 2 of 3\n{texts[1]}\n--- 3 of 3\n{texts[2]}\n"
    assert len(set(texts)) == 3


def test_an_empty_prompt_begins_a_document(run, loaded):
    code, out, _ = run("--prompt", "", "--max-tokens", "5", "--temperature", "0")
    assert (code, out) == (0, continued(loaded, "", 5) + "\n")


def test_without_a_length_a_text_takes_what_room_there_is(run):
    _, _, err = run("--prompt", "ka " * 100, "--temperature", "0")
    prompt = int(re.search(r"prompt: (\d+) tokens", err)[1])
    assert f"text: {min(256, 320 - prompt)} tokens" in err


def test_characters_of_several_tokens_are_shown_whole(job, loaded, monkeypatch):
    text, shown = "é→🙂", []
    monkeypatch.setattr(job, "show", shown.append)
    tokens = [loaded.tokenizer.encode(character) for character in text]
    assert all(len(ids) > 1 for ids in tokens)
    steps = [[token] for ids in tokens for token in ids] + [[tokens[0][0]]]  # and at the end a fragment
    monkeypatch.setattr(generation, "generate", lambda *args, **kwargs: iter(steps))
    job.Writer(loaded, generation.LIKELIEST, 9, 1).write("")
    assert "".join(shown) == text + "\N{REPLACEMENT CHARACTER}\n"
    assert [part for part in shown if part] == [*text, "\N{REPLACEMENT CHARACTER}\n"]


@pytest.mark.parametrize("typed", [True, False], ids=["terminal", "pipe"])
def test_ctrl_c_stops_the_text_and_only_in_a_pipe_the_program(job, loaded, monkeypatch, typed, capsys):
    def interrupted(*args, **kwargs):
        yield [loaded.tokenizer.encode("a")[0]]
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", interrupted)
    stdin = io.StringIO("one\ntwo\n")
    monkeypatch.setattr(stdin, "isatty", lambda: typed)
    monkeypatch.setattr(sys, "stdin", stdin)
    writer = job.Writer(loaded, generation.LIKELIEST, 9, 1)
    if typed:
        job.converse(writer)
    else:
        with pytest.raises(KeyboardInterrupt):
            job.converse(writer)
    shown = capsys.readouterr().out.replace("> ", "")
    assert shown.split() == (["onea", "twoa"] if typed else ["onea"])
    assert shown.endswith("\n")


def test_what_a_terminal_would_obey_is_not_sent_to_it(job, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    job.show("a\x1b]0;title\x07b\x9b2Jc\td\n")
    assert terminal.getvalue() == "a\ufffd]0;title\ufffdb\ufffd2Jc\td\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature=-1.0 cannot be"),
        (["--top-k", "0"], "top_k=0 leaves no token"),
        (["--top-p", "2"], "top_p=2.0 is no share"),
        (["--num-samples", "0"], "--num-samples 0 asks for nothing"),
        (["--max-tokens", "0"], "max_tokens=0 asks for nothing"),
        (["--max-tokens", "1000"], "do not fit the 320 positions of the model"),
        (["--model-tag", "nobody"], "holds no checkpoint"),
        (["--step", "3"], "--step 3"),
        (["--path", "/nowhere"], "/nowhere is not there"),
        (["--device-type", "tpu"], "invalid choice: 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_2_and_one_message(run, flags, message):
    code, out, err = run("--prompt", "ka", *flags)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out.strip() in ("", "ka")


def test_help_does_not_wait_for_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['jobs/sample.py', '--help']\n"
        "try:\n    runpy.run_path('jobs/sample.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--num-samples" in done.stdout
