"""CORE: the verdicts of a plain implementation, whatever the batches and however many ranks."""

import json
import random
from dataclasses import replace

import pytest
import torch
from benchmarks.core import measure, one_process, random_model, table
from core_bundles import SHARED, WORDS, write_bundle
from core_reference import verdicts
from ranks import run_ranks

from raychat.data.tokenizer import Tokenizer, train_tokenizer
from raychat.errors import ConfigError
from raychat.evaluation.core import Bundle, CoreResult, evaluate, evaluate_core, load_bundle
from raychat.evaluation.core.prompts import question, texts
from raychat.evaluation.core.reference import CORE_METRIC, GPT2, MODELS
from raychat.evaluation.core.scoring import CLOSE, answer, answer_alone, batches, trees
from raychat.model import GPT, GPTConfig
from raychat.training.world import World

REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="the developer subset of the CORE data is not on this machine")
# One of each kind, with and without examples, in one token and many.
REAL_TASKS = ["copa", "winogrande", "jeopardy", "commonsense_qa", "bigbench_operators", "lambada_openai"]


def make_model(sequence_len: int = 256, seed: int = 0) -> GPT:
    """A model whose every part matters: what begins at zero is random too."""
    config = GPTConfig(
        sequence_len=sequence_len, vocab_size=600, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL"
    )
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                parameter.normal_(0, 0.2, generator=generator)
        model.smear_lambda.fill_(0.7)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=30)) for _ in range(50)]
    english = [json.__doc__ or "", random.__doc__ or "", torch.Tensor.view.__doc__ or "", "Question: Answer: the " * 5]
    return train_tokenizer([*lines, *english], vocab_size=600, echo=lambda line: None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    folder = write_bundle(tmp_path_factory.mktemp("core") / "bundle")
    return load_bundle(str(folder), folder, lambda line: None)


def run(model, tokenizer, bundle, cap=-1, **options) -> CoreResult:
    result = evaluate_core(
        model, tokenizer, bundle, max_per_task=cap, world=World(), **{"echo": lambda line: None} | options
    )
    assert result is not None
    return result


def seen(result: CoreResult) -> dict:
    """What must not depend on anything but the model and the data."""
    return {
        label: [(item.index, item.line, item.correct, item.predicted, item.gold) for item in task.items]
        for label, task in result.tasks.items()
    }


def only(bundle: Bundle, labels: list[str]) -> Bundle:
    return replace(bundle, tasks=tuple(task for task in bundle.tasks if task.label in labels))


@REAL
@pytest.mark.parametrize("sequence_len", [512, 16], ids=["whole rows", "rows cut from the left"])
def test_verdicts_on_real_tasks_are_those_of_a_plain_implementation(sequence_len, tokenizer, tmp_path):
    """Rows of the second model lose their beginning, most of them bos too: it reaches 160 positions."""
    model = make_model(sequence_len)
    real = only(load_bundle(str(SHARED), tmp_path, print), REAL_TASKS)
    result = run(model, tokenizer, real, cap=12)
    expected = verdicts(model, tokenizer, SHARED, 12, REAL_TASKS)
    assert {label: [item.correct for item in task.items] for label, task in result.tasks.items()} == expected
    assert 0 < sum(sum(one) for one in expected.values()) < 12 * len(REAL_TASKS)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_verdicts_do_not_depend_on_the_batch(dtype, tokenizer, bundle):
    model = make_model()
    model.set_compute_dtype(dtype)
    results = [run(model, tokenizer, bundle, batch_tokens=size) for size in (1, 300, 10**6)]
    assert seen(results[0]) == seen(results[1]) == seen(results[2])
    for label, task in results[0].tasks.items():
        for one, other in zip(task.items, results[2].tasks[label].items, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=CLOSE[dtype][task.kind == "language_modeling"])


def test_verdicts_do_not_depend_on_the_number_of_ranks(tokenizer, bundle, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    alone = run(make_model(), tokenizer, bundle)
    results = run_ranks(on_a_rank, 2, tmp_path / "tokenizer", bundle)
    assert [seen(result) for result in results] == [seen(alone)] * 2
    assert results[0] == results[1]


def on_a_rank(tokenizer, bundle) -> CoreResult | None:
    evaluate.SLICE_CHARACTERS = 700  # several slices a task; in this process alone
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return evaluate_core(
        make_model(), Tokenizer.load(tokenizer), bundle, max_per_task=-1, world=world, batch_tokens=500, echo=print
    )


def test_questions_are_in_tokens_a_slice_at_a_time_and_that_changes_no_verdict(tokenizer, bundle, monkeypatch):
    """A slice holds the most questions that its characters allow, and at least one."""
    whole = run(make_model(), tokenizer, bundle)
    held = most_held(tokenizer, bundle)
    assert held == 12  # a task
    monkeypatch.setattr(evaluate, "SLICE_CHARACTERS", 1)
    assert most_held(tokenizer, bundle) == 1
    longest = max(len(text) for task in bundle.tasks for i in range(12) for text in texts(task, i))
    monkeypatch.setattr(evaluate, "SLICE_CHARACTERS", 12 * longest)
    assert 3 <= most_held(tokenizer, bundle) <= 12
    assert seen(run(make_model(), tokenizer, bundle)) == seen(whole)


def most_held(tokenizer, bundle) -> int:
    """The most questions that were in tokens and not answered yet, at any time of an evaluation in passes of one."""
    made, answered, most = 0, 0, 0

    class Counting:
        bos_id = tokenizer.bos_id

        def encode(self, text):
            nonlocal made
            made += 1
            return tokenizer.encode(text)

    def between():
        nonlocal answered, most
        most, answered = max(most, made - answered), answered + 2
        return False

    only_schema = only(bundle, ["resolving"])  # two options an item, each encoded once
    run(make_model(), Counting(), only_schema, batch_tokens=1, between=between)
    assert made == answered == 24
    return most // 2


def test_every_rank_is_asked_equally_often_and_may_stop_together(tokenizer, bundle, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    asked = run_ranks(asking_ranks, 2, tmp_path / "tokenizer", bundle)
    assert asked[0] == asked[1]
    whole, ended = asked[0]
    assert whole >= 36 // 2  # one question a pass, shared by two ranks
    assert ended == (True, 3)


def asking_ranks(tokenizer, bundle):
    model, codec = make_model(), Tokenizer.load(tokenizer)
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    count = 0

    def between(limit: int | None = None) -> bool:
        nonlocal count
        count += 1
        torch.distributed.barrier()  # as the loop's own questions are: would hang if one rank asked more often
        return count == limit

    common = {"max_per_task": -1, "world": world, "batch_tokens": 1, "echo": print}
    assert evaluate_core(model, codec, bundle, between=between, **common) is not None
    whole, count = count, 0
    return whole, (evaluate_core(model, codec, bundle, between=lambda: between(3), **common) is None, count)


def test_a_question_that_rounding_could_decide_is_decided_alone(tokenizer, bundle, monkeypatch):
    """With every margin called close, the answers are those of single unpadded rows, score for score."""
    model = make_model()
    for task in bundle.tasks:
        questions = [question(task, i, tokenizer, 2560) for i in range(12)]
        with monkeypatch.context() as patch:
            patch.setitem(CLOSE, torch.float32, (1e9, 1e9))
            assert answer(model, questions) == [replace(answer_alone(model, q), close=True) for q in questions]
        assert any(not result.close for result in answer(model, questions))


def test_a_tie_goes_to_the_first_option(tokenizer, bundle):
    """A model that knows nothing finds all tokens equally likely."""
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = run(model, tokenizer, bundle)
    for label in ("choosing", "resolving"):
        assert all(item.predicted == 0 for item in result.tasks[label].items)
    assert not any(item.correct for item in result.tasks["continuing"].items)  # id 0 is no text of a continuation


def test_equal_options_have_equal_scores_and_an_option_without_tokens_of_its_own_is_not_chosen(tokenizer, bundle):
    task = bundle.tasks[0]
    same = replace(task.items[0], options=(("q", "kalo miru"), ("q", "tesha"), ("q", "kalo miru")))
    q = question(replace(task, items=(same,), shots=0), 0, tokenizer, 2560)
    scores = answer(make_model(), [q])[0].scores
    assert scores[0] == scores[2] != scores[1]
    starts = replace(task.items[0], options=(("q", "kalo"), ("q", "kalo miru")))
    q = question(replace(task, items=(starts,), shots=0), 0, tokenizer, 2560)
    assert q.rows[0].start == q.rows[0].end
    result = answer(make_model(), [q])[0]
    assert (result.predicted, result.scores[0]) == (1, float("inf"))


def test_a_model_that_is_told_the_answers_has_them_all(tokenizer, bundle):
    """Its hidden states come from a table that makes the next token of every row certain."""
    model = make_model()
    right = {}
    for task in bundle.tasks:
        for i in range(12):
            q = question(task, i, tokenizer, 2560)
            row = q.rows[q.gold]
            for t in range(row.start, row.end):
                right[row.ids[:t]] = row.ids[t]
    model.hidden = told(right, model.lm_head.weight)  # pyrefly: ignore[bad-assignment]
    result = run(model, tokenizer, only(bundle, ["continuing"]))
    assert result.tasks["continuing"].accuracy == 1.0
    assert result.core_metric == 1.0


def told(right, weight):
    """A stand-in for `GPT.hidden` that points at the embedding of the token which `right` says comes next."""

    def hidden(idx, cache=None, counts=None):
        wanted = [[right.get(tuple(row[: t + 1]), 0) for t in range(len(row))] for row in idx.tolist()]
        directions = torch.nn.functional.normalize(weight, dim=1)
        return 100 * directions[torch.tensor(wanted)]

    return hidden


def test_examples_stand_in_front_and_only_the_space_of_the_continuation_is_its_own(tokenizer, bundle):
    task = bundle.tasks[2]
    text = texts(task, 3)[0]
    shot = random.Random(1234 + 3).sample([i for i in range(12) if i != 3], 1)[0]
    (prompt, answer_), (shown, solved) = task.items[3].options[0], task.items[shot].options[0]
    assert text == f"{shown} {solved}\n\n{prompt} {answer_}"
    q = question(task, 3, tokenizer, 2560)
    assert q.rows[0].ids[0] == tokenizer.bos_id
    assert tokenizer.decode(q.rows[0].ids[1 : q.rows[0].start]) == text.removesuffix(f" {answer_}")
    assert tokenizer.decode(q.rows[0].ids[q.rows[0].start :]) == f" {answer_}"


def test_every_item_is_shown_the_examples_that_are_drawn_from_a_list_of_the_others(bundle):
    task = bundle.tasks[0]
    for index, item in enumerate(task.items):
        others = [other for i, other in enumerate(task.items) if i != index]
        drawn = random.Random(1234 + index).sample(others, task.shots)
        shots = [prompt + task.delimiter + choice for prompt, choice in (one.options[one.gold] for one in drawn)]
        assert texts(task, index)[0] == "\n\n".join([*shots, task.delimiter.join(item.options[0])])


def test_a_row_that_is_too_long_keeps_its_end_and_scores_what_is_left(tokenizer, bundle):
    whole, short = question(bundle.tasks[0], 0, tokenizer, 2560), question(bundle.tasks[0], 0, tokenizer, 10)
    for row, cut in zip(whole.rows, short.rows, strict=True):
        assert cut.ids == row.ids[-10:]
        assert cut.start == max(1, row.start - (len(row.ids) - 10))
        assert cut.ids[cut.start :] == row.ids[row.start :][-(10 - cut.start) :]


def test_batches_hold_every_question_once_within_their_bound(tokenizer, bundle):
    for task in bundle.tasks:
        questions = [question(task, i, tokenizer, 2560) for i in range(12)]
        for bound in (1, 200, 1000, 10**6):
            made = batches(questions, bound)
            assert sorted(q.index for batch in made for q in batch) == list(range(12))
            for batch in (batch for batch in made if len(batch) > 1):
                forest = [tree for q in batch for tree in trees(q)]
                stem, branch = max(t.stem for t in forest), max(t.branch for t in forest)
                assert len(forest) * stem + sum(t.branches for t in forest) * (stem + branch) <= bound
        assert len(batches(questions, 1)) == 12
        assert len(batches(questions, 10**6)) == 1


def test_too_small_a_cap_is_refused_before_the_model_is_touched(tokenizer, bundle):
    with pytest.raises(ConfigError, match="--core-metric-max-per-task=2"):
        evaluate_core(None, tokenizer, bundle, max_per_task=2, world=World(), echo=print)  # pyrefly: ignore


def test_the_metric_is_the_mean_of_the_centred_accuracies_and_the_json_says_all(tokenizer, bundle):
    lines = []
    result = run(make_model(), tokenizer, bundle, echo=lines.append)
    centered = {
        task.label: (sum(i.correct for i in task.items) / 12 - task.baseline) / (1 - task.baseline)
        for task in result.tasks.values()
    }
    assert result.core_metric == pytest.approx(sum(centered.values()) / 3)
    assert result.metrics() == pytest.approx(
        {"core_metric": result.core_metric} | {f"core/{label}": value for label, value in centered.items()}
    )
    for label in centered:
        assert sum(label in line and "accuracy" in line for line in lines) == 1
    said = json.loads(result.to_json())
    assert said["format"] == "raychat-core-1"
    assert said["core_metric"] == result.core_metric
    for label, task in result.tasks.items():
        assert [item["correct"] for item in said["tasks"][label]["items"]] == [item.correct for item in task.items]
        assert said["tasks"][label]["accuracy"] == task.accuracy
    # An answer to one item is one line, so that two files can be compared line by line.
    assert sum(line.startswith('{"index"') for line in result.to_json().splitlines()) == 36


def test_the_published_figures_agree_with_each_other():
    """The mean of the centred accuracies is the published CORE up to the four digits of the accuracies."""
    for n, name in enumerate(MODELS):
        mean = sum(reference.centered[n] for reference in GPT2.values()) / len(GPT2)
        assert mean == pytest.approx(CORE_METRIC[name], abs=1e-4)


def test_every_lever_of_the_benchmark_gives_the_verdicts_of_the_naive_way(tokenizer, bundle):
    lines = []
    ways = one_process(random_model(tokenizer.vocab_size), tokenizer)
    seconds = measure(bundle, ways, lines.append)
    assert [len(task) for task in seconds.values()] == [len(ways)] * 3
    assert not any("differs" in line for line in lines)
    wrong = {"naive": ways["naive"], "wrong": lambda bundle: [None] * 12}
    measure(bundle, wrong, lines.append)
    assert any("wrong differs from naive" in line for line in lines)
    assert "2.0 (1.5 to 2.5) x naive" in table([rated(30, 20), rated(50, 20)], ["naive", "read"])[2]


def rated(*seconds: float) -> dict[str, dict[str, float]]:
    """Two tasks that took so long together, the ways in turn."""
    return {task: {"naive": seconds[0] / 2, "read": seconds[1] / 2} for task in ("one", "other")}
