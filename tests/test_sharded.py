"""The sharded optimizer: the same update whatever the number of ranks, state at its owner only, groups as stated."""

import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from raychat.errors import CheckpointError
from raychat.model import GPT, GPTConfig
from raychat.optim import MuonAdamW, build_optimizer
from raychat.optim.exchange import Scatter
from raychat.optim.groups import group_of, parameter_groups
from raychat.optim.sharded import square_sum

CONFIG = GPTConfig(sequence_len=16, vocab_size=100, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="L")
RATES = {"embedding_lr": 0.03, "unembedding_lr": 0.0008, "matrix_lr": 0.002, "scalar_lr": 0.05, "weight_decay": 0.28}
STEPS = 4
WORLDS = [1, 2, 3, 5]
Result = tuple[dict[str, Tensor], list[float], dict[str, tuple[int, Tensor]]]


def lively(dtype: torch.dtype = torch.float32) -> GPT:
    """A model in which every parameter has a gradient from the first step."""
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "c_proj" in name or "gate" in name or name in ("lm_head.weight", "smear_lambda"):
                param.normal_(0, 0.2, generator=generator)
    model.set_compute_dtype(dtype)
    return model


def backward(model: GPT, step: int, rank: int, world: int) -> None:
    """This rank's share of 30 rows: the sum of nats over its rows divided by the tokens of all rows."""
    rows = torch.randint(100, (30, 17), generator=torch.Generator().manual_seed(step))
    mine = rows[rank::world]
    (model(mine[:, :-1], mine[:, 1:], "sum") / (30 * 16)).backward()


def make(exchange: str = "auto", dtype: torch.dtype = torch.float32, grad_clip: float = 0.0) -> tuple[GPT, MuonAdamW]:
    model = lively(dtype)
    optimizer = build_optimizer(model, **RATES)
    if exchange == "scatter":  # gloo can do it too, only slowly
        groups = parameter_groups(model, **RATES)
        optimizer = MuonAdamW(groups, Scatter(dist.get_rank()))
    optimizer.grad_clip = grad_clip
    return model, optimizer


def train(model: GPT, optimizer: MuonAdamW, steps: range) -> list[float]:
    """Steps with a schedule on all that a schedule may set; the norms of the gradients."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    norms = []
    for step in steps:
        backward(model, step, rank, world)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 10)
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = 0.85 + 0.01 * step, 0.28 - 0.05 * step
        norms.append(optimizer.step().item())
        optimizer.zero_grad(set_to_none=True)
    return norms


def trained(exchange: str, dtype: torch.dtype, grad_clip: float) -> Result:
    model, optimizer = make(exchange, dtype, grad_clip)
    norms = train(model, optimizer, range(STEPS))
    return model.state_dict(), norms, optimizer.owned_state()


def continued(saved: dict[str, Tensor], whole: dict[str, Tensor], start: int) -> tuple[dict[str, Tensor], list[str]]:
    """Go on from saved parameters and whole states; also what was read, as "key first stop"."""
    model, optimizer = make()
    model.load_state_dict(saved)
    asked = []

    def read(key: str, first: int, stop: int) -> Tensor:
        asked.append(f"{key} {first} {stop}")
        return whole[key][first:stop]

    optimizer.load_owned_state(read)
    optimizer.step_count = start
    train(model, optimizer, range(start, STEPS))
    return model.state_dict(), asked


def joined(states: list[dict[str, tuple[int, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors out of the ranks' rows; rows must follow each other without gap or overlap."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for state in states:
        for key, part in state.items():
            parts.setdefault(key, []).append(part)
    whole = {}
    for key, rows in parts.items():
        end = 0
        for first, tensor in sorted(rows, key=lambda row: row[0]):
            assert first == end, key
            end += tensor.size(0)
        whole[key] = torch.cat([tensor for _, tensor in sorted(rows, key=lambda row: row[0])])
    return whole


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to float32 rounding of the summed gradients, which AdamW's division passes on to small entries."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def trained_both_ways(dtype: torch.dtype, grad_clip: float) -> list[Result]:
    """With the exchange that gloo gets, and with the one that NCCL gets."""
    return [trained(exchange, dtype, grad_clip) for exchange in ("auto", "scatter")]


@pytest.mark.parametrize("world", WORLDS)
def test_any_number_of_ranks_makes_the_update_of_one_process(world):
    expected, expected_norms, expected_state = trained("auto", torch.float32, 0.0)
    shapes = make()[1].state_shapes()
    for results in zip(*run_ranks(trained_both_ways, world, torch.float32, 0.0), strict=True):
        for weights, norms, _ in results:
            assert norms == pytest.approx(expected_norms, rel=1e-4)
            assert all(torch.equal(weights[name], results[0][0][name]) for name in weights)  # ranks agree bit for bit
        assert_same(results[0][0], expected)
        whole = joined([state for _, _, state in results])
        assert whole.keys() == expected_state.keys()
        assert {key: tensor.shape for key, tensor in whole.items()} == shapes
        held = [sum(tensor.numel() for _, tensor in state.values()) for _, _, state in results]
        assert sum(held) == sum(shape.numel() for shape in shapes.values())  # nothing is held twice
        if world == 2:
            assert max(held) < 0.6 * sum(held)  # not half, because three matrices of one shape go two to one


@pytest.mark.parametrize("world", [1, 2, 3])
def test_state_saved_by_two_ranks_continues_on_any_number(world):
    expected = trained("auto", torch.float32, 0.0)[0]
    saved = run_ranks(half_way, 2)
    results = run_ranks(continued, world, saved[0][0], joined([state for _, state in saved]), 2)
    assert_same(results[0][0], expected)
    asked = [line for _, lines in results for line in lines]
    assert len(asked) == len(set(asked))  # no rank asks for what another owns


def half_way() -> tuple[dict[str, Tensor], dict[str, tuple[int, Tensor]]]:
    model, optimizer = make()
    train(model, optimizer, range(2))
    return model.state_dict(), optimizer.owned_state()


def test_a_stop_in_one_process_changes_no_bit():
    model, optimizer = make()
    train(model, optimizer, range(2))
    whole = {key: tensor.clone() for key, (_, tensor) in optimizer.owned_state().items()}
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    resumed, _ = continued(saved, whole, 2)
    train(model, optimizer, range(2, STEPS))
    assert all(torch.equal(resumed[name], value) for name, value in model.state_dict().items())


def test_bfloat16_embeddings_keep_bfloat16_moments_on_any_number_of_ranks():
    """Sums of gradients are rounded to bfloat16 once per rank, and steps are up to lr: hence the tolerance of one lr."""
    expected, _, state = trained("auto", torch.bfloat16, 0.0)
    assert state["transformer.wte.weight/exp_avg"][1].dtype == torch.bfloat16
    assert state["lm_head.weight/exp_avg"][1].dtype == torch.float32
    for weights, _, _ in run_ranks(trained_both_ways, 2, torch.bfloat16, 0.0)[0]:
        for name, value in expected.items():
            difference = (weights[name].float() - value.float()).norm() / value.float().norm()
            assert difference < 0.05, name


def test_clipping_bounds_the_norm_of_what_is_applied_on_any_number_of_ranks():
    model, optimizer = make(grad_clip=0.01)
    backward(model, 0, 0, 1)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in before.values()]).norm()
    torch.testing.assert_close(optimizer.step(), norm)  # the norm before clipping
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * (0.01 / norm), rtol=1e-3, atol=1e-9)
    expected = trained("auto", torch.float32, 0.01)[0]
    for weights, _, _ in run_ranks(trained_both_ways, 2, torch.float32, 0.01)[0]:
        assert_same(weights, expected)


def test_a_loss_scale_is_divided_out():
    results = []
    for scale in (1.0, 1024.0):
        model, optimizer = make(grad_clip=0.05)
        optimizer.grad_scale = scale
        backward(model, 0, 0, 1)
        for p in model.parameters():
            p.grad.mul_(scale)
        results.append((optimizer.step(), model.state_dict()))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-5, atol=1e-6)


def test_a_missing_gradient_counts_as_zero():
    results = []
    for missing in (True, False):
        model, optimizer = make()
        backward(model, 0, 0, 1)
        for name in ("value_embeds.2.weight", "transformer.h.1.mlp.c_fc.weight", "smear_lambda"):
            param = model.get_parameter(name)
            param.grad = None if missing else torch.zeros_like(param)
        optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_the_norm_is_exact_wherever_ranks_cut():
    """Float32 over whole tensors is off by 1e-4; rows of float32 added up in float64 are not."""
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(0)) + 1
    exact = values.double().square().sum()
    for cut in (0, 1, 4096, 123_456, 300_001):
        found = square_sum([values[:cut], values[cut:]], values.device)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    assert square_sum([], values.device) == 0


def test_a_non_finite_norm_shows_before_anything_is_updated():
    model, optimizer = make()
    backward(model, 0, 0, 1)
    model.x0_lambdas.grad[1] = torch.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not optimizer.reduce_gradients().isfinite()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert optimizer.step_count == 0


def test_gradients_of_an_update_that_is_left_out_are_not_kept():
    model, optimizer = make()
    backward(model, 0, 0, 1)
    optimizer.reduce_gradients()
    held = [weakref.ref(param.grad) for param in model.parameters()]
    optimizer.zero_grad()
    assert all(gradient() is None for gradient in held)
    with pytest.raises(RuntimeError, match="reduce_gradients"):
        optimizer.apply_updates()


def test_updates_without_reduced_gradients_are_refused():
    with pytest.raises(RuntimeError, match="reduce_gradients"):
        make()[1].apply_updates()


def test_state_of_another_shape_is_refused_by_name():
    with pytest.raises(CheckpointError, match="lm_head.weight/exp_avg"):
        make()[1].load_owned_state(lambda key, first, stop: torch.zeros(stop - first, 7))


def test_torch_state_dicts_are_refused_with_the_way_out():
    optimizer = make()[1]
    with pytest.raises(NotImplementedError, match="owned_state"):
        optimizer.state_dict()
    with pytest.raises(NotImplementedError, match="load_owned_state"):
        optimizer.load_state_dict({})


def test_groups_are_the_stated_table():
    model = GPT(CONFIG)
    groups = build_optimizer(model).param_groups
    by_name = {name: group for group in groups for name in group["names"]}
    assert sorted(by_name) == sorted(name for name, _ in model.named_parameters())
    scale = (32 / 768) ** -0.5
    rows = {
        "lm_head.weight": (0.008 * scale, (0.8, 0.96), 0.01),
        "transformer.wte.weight": (0.3 * scale, (0.8, 0.995), 0.001),
        "value_embeds.0.weight": (0.15 * scale, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.005, (0.8, 0.95), 0.05),
        "x0_lambdas": (0.5, (0.96, 0.95), 0.0),
        "smear_gate.weight": (0.2, (0.8, 0.95), 0.0),
        "smear_lambda": (0.2, (0.8, 0.95), 0.0),
        "backout_lambda": (0.2, (0.8, 0.95), 0.0),
    }
    for name, (lr, betas, weight_decay) in rows.items():
        group = by_name[name]
        assert (group["kind"], group["betas"], group["eps"]) == ("adamw", betas, 1e-10)
        assert group["lr"] == group["initial_lr"] == pytest.approx(lr)
        assert group["weight_decay"] == weight_decay
    matrices = by_name["transformer.h.0.attn.ve_gate.weight"]
    assert (matrices["kind"], matrices["lr"], matrices["beta2"], matrices["weight_decay"]) == ("muon", 0.02, 0.9, 0.28)
    assert {name for name, group in by_name.items() if group["kind"] == "muon"} == {
        name for name in by_name if name.startswith("transformer.h.")
    }


def test_given_betas_reach_head_and_embeddings_only():
    groups = build_optimizer(GPT(CONFIG), adam_beta1=0.7, adam_beta2=0.9).param_groups
    betas = {name: group["betas"] for group in groups if group["kind"] == "adamw" for name in group["names"]}
    changed = {name for name, pair in betas.items() if pair == (0.7, 0.9)}
    assert changed == {"lm_head.weight", "transformer.wte.weight", "value_embeds.0.weight", "value_embeds.2.weight"}


def test_an_unknown_parameter_is_never_grouped_silently():
    with pytest.raises(ValueError, match="belongs to no group"):
        group_of("extra.weight")
