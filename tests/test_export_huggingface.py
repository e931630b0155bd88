"""transformers loads the exported directory, without a network, and computes what raychat computes."""

import importlib
import json
import os
import shutil
import sys

import pytest
import torch
from exports import CPU, make_source, probe

from raychat.export.facts import training_facts
from raychat.export.write import export
from raychat.tracking.journal import Journal

F32 = torch.float32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """The exported directory. Not to be written to."""
    target = tmp_path_factory.mktemp("out") / "hf"
    export(source, target, ["huggingface"], dtype=F32, echo=lambda line: None)
    return target


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """transformers with a cache of its own and no network; it reads its settings when it is imported."""
    settings = {
        "HF_HOME": str(tmp_path_factory.mktemp("hf-home")),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setitem(os.environ, name, value)
        yield pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs(hub, folder):
    return hub.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def ours(source):
    return source.load(CPU, F32)


def test_logits_in_transformers_are_those_of_raychat(theirs, ours, source):
    """To 1e-5 in float32, over windows, grouped heads, value embeddings and smear; nothing was left at its start."""
    ids = probe(source)
    with torch.no_grad():
        difference = (theirs(ids).logits - ours.model(ids)).abs().max()
    assert theirs(ids).logits.shape == (2, 300, 300)
    assert difference < 1e-5


def test_loss_with_labels_is_the_mean_cross_entropy_of_the_next_tokens(theirs, ours, source):
    ids = probe(source)
    labels = ids.clone()
    labels[0, :100] = -100
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == -100, -1)
    with torch.no_grad():
        assert theirs(ids, labels=labels).loss.item() == pytest.approx(
            ours.model(ids[:, :-1], targets).item(), rel=1e-5
        )


def test_parts_of_a_batch_add_up_to_its_loss_when_told_how_many_labels_it_has(theirs, source):
    """What transformers' Trainer asks for when it accumulates gradients over parts."""
    labels = probe(source)
    labels[0, :100] = -100
    count = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        whole = theirs(probe(source), labels=labels).loss
        parts = [
            theirs(row[None], labels=label[None], num_items_in_batch=torch.tensor(count)).loss
            for row, label in zip(probe(source), labels, strict=True)
        ]
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-5)


def test_padding_on_the_left_changes_nothing(theirs, source):
    """Rotary positions are relative, padded keys are not seen, and the first token has nothing before it to smear."""
    ids = probe(source)[:1]
    padded = torch.cat([torch.full((1, 9), 5), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.long), torch.ones_like(ids)], dim=1)
    with torch.no_grad():
        alone, beside = theirs(ids).logits, theirs(padded, attention_mask=mask).logits[:, 9:]
    assert (alone - beside).abs().max() < 1e-4


def test_generate_is_the_greedy_continuation_of_raychat(theirs, ours, hub, folder):
    """A batch of two lengths, each as it is alone."""
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    prompts = ["some words and", "1234"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    made = theirs.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, temperature=None, max_new_tokens=12
    )
    for prompt, row in zip(prompts, made.tolist(), strict=True):
        ids = [ours.tokenizer.bos_id, *ours.tokenizer.encode(prompt)]
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(ours.model(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == ours.tokenizer.bos_id:
                break
        start = inputs.input_ids.size(1) - len(ours.tokenizer.encode(prompt)) - 1
        assert row[start : start + len(ids)] == ids


def test_cache_is_refused_rather_than_wrong(theirs, source):
    with pytest.raises(ValueError, match="use_cache=False"):
        theirs.generate(probe(source)[:, :5], use_cache=True, max_new_tokens=2)


def test_tokenizer_in_transformers_gives_the_ids_of_raychat(ours, hub, folder):
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    text = "some words <|user_start|> 12345 naïve\n\n  x"
    assert isinstance(tokenizer, hub.PreTrainedTokenizerFast)
    assert tokenizer(text, add_special_tokens=False).input_ids == ours.tokenizer.encode(text)
    assert tokenizer(text).input_ids == [ours.tokenizer.bos_id, *ours.tokenizer.encode(text)]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == ours.tokenizer.bos_id
    assert tokenizer.decode(ours.tokenizer.encode(text)) == text


def test_saved_again_by_transformers_it_is_the_same_model(theirs, folder, hub, tmp_path, source):
    theirs.save_pretrained(tmp_path / "again")
    again = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(probe(source)).logits, theirs(probe(source)).logits)


class TestCard:
    def test_what_the_card_says_to_type_works_and_asks_nothing(self, folder, hub, capsys):
        code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        exec(code, {"PATH": str(folder)})
        said = capsys.readouterr()
        assert said.out.startswith("The largest city of Japan is")
        assert "[y/N]" not in said.out

    def test_card_and_facts_say_what_is_known_and_that_the_rest_is_not(self, folder):
        card = (folder / "README.md").read_text()
        assert "| val_bpb | 1.2500 |" in card
        assert "| tokens | 35,840 |" in card  # 70 rows of 512
        for unknown in ("CORE", "cost", "commit"):
            assert f"| {unknown} | not measured |" in card

    def test_nothing_of_the_machine_that_trained_it_is_given_away(self, folder, source):
        text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json"))
        assert "private" not in text
        assert str(source.run_dir) not in text
        assert json.loads((folder / "raychat.json").read_text())["corpus"] == "texts"

    def test_results_that_came_after_the_checkpoint_are_taken_from_the_journal(self, source, tmp_path):
        again = make_source(tmp_path / "made")
        journal = Journal(again.run_dir / "metrics.jsonl", driver="a")
        journal.log(6, {"cost/usd": 1.5, "val/bpb": 3.0})
        journal.log(7, {"core_metric": 0.25, "core/one": 0.5, "val/bpb": 1.125})
        journal.log(8, {"core_metric": 0.75, "cost/usd": 9.0})
        journal.close()
        (again.run_dir / "mlflow.json").write_text(
            json.dumps({"tags": {"raychat.git_commit": "abc123"}, "dataset": {"name": "essays"}})
        )
        facts = training_facts(again, again.load(CPU).model)
        known = {"core_metric": 0.25, "core_tasks": {"one": 0.5}, "val_bpb": 1.125, "cost_usd": 1.5}
        assert {key: facts[key] for key in known} == known
        assert (facts["commit"], facts["corpus"]) == ("abc123", "essays")


def test_directory_needs_no_raychat(folder, hub, ours, tmp_path, source, monkeypatch):
    """Where raychat cannot be imported, its code is read and computes the same."""
    copy = shutil.copytree(folder, tmp_path / "far")
    for name in [name for name in sys.modules if name.partition(".")[0] == "raychat"]:
        monkeypatch.setitem(sys.modules, name, None)
    far = hub.AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    with pytest.raises(ImportError):
        importlib.import_module("raychat")
    monkeypatch.undo()
    assert type(far).__module__.startswith("transformers_modules.far.")
    with torch.no_grad():
        assert (far(probe(source)).logits - ours.model(probe(source))).abs().max() < 1e-5
