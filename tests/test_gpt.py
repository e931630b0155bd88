"""The model: laws of its forward pass, its initialisation, its dtypes and its configuration."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raychat.config import Config
from raychat.errors import ConfigError
from raychat.model import GPT, GPTConfig
from raychat.model import fp8 as fp8_module
from raychat.model.fp8 import fp8_capable, fp8_training, high_precision, takes_fp8
from raychat.model.gpt import Linear, norm, rotate
from raychat.planning import flops_per_token, model_shape, param_counts
from raychat.training.build import gpt_config

SMALL = GPTConfig(sequence_len=192, vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")


def tokens(rows: int, T: int, vocab: int = 97) -> Tensor:
    return torch.randint(vocab, (rows, T), generator=torch.Generator().manual_seed(T))


def lively(config: GPTConfig = SMALL) -> GPT:
    """A model all of whose parameters matter: the zeros and near-zeros of the initialisation are replaced."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "c_proj" in name or "gate" in name or name in ("lm_head.weight", "smear_lambda"):
                param.normal_(0, 0.3, generator=generator)
    return model


def config_of_depth(depth: int, pattern: str) -> GPTConfig:
    dim = math.ceil(depth * 64 / 128) * 128
    return GPTConfig(n_layer=depth, n_head=dim // 128, n_kv_head=dim // 128, n_embd=dim, window_pattern=pattern)


# Worked values of the design: depth, all parameters, block matrices and head, FLOPs with SSSL and with L.
WORKED = [
    (2, 12_976_170, 4_587_532, 31_457_496, 33_816_792),
    (12, 286_261_730, 110_100_912, 759_696_048, 887_098_032),
    (20, 896_533_746, 435_160_240, 2_886_212_784, 3_240_107_184),
    (32, 2_818_575_450, 1_677_724_672, 10_770_991_248, 11_676_960_912),
]


@pytest.mark.parametrize(("depth", "total", "scaling", "flops_sssl", "flops_l"), WORKED)
def test_counts_and_flops_are_the_worked_values(depth, total, scaling, flops_sssl, flops_l):
    with torch.device("meta"):
        model, full_context = GPT(config_of_depth(depth, "SSSL")), GPT(config_of_depth(depth, "L"))
    counts = model.num_params()
    assert counts["total"] == total
    assert counts["transformer_matrices"] + counts["lm_head"] == scaling
    assert model.flops_per_token() == flops_sssl
    assert full_context.flops_per_token() == flops_l


def test_no_position_sees_its_future():
    model, idx = lively(), tokens(1, 192)
    changed = idx.clone()
    changed[0, 100] = (idx[0, 100] + 1) % 97
    with torch.no_grad():
        moved = (model(idx) != model(changed)).any(-1)[0]
    assert not moved[:100].any()
    assert moved[100]


def test_rows_of_a_batch_do_not_touch_each_other():
    model, idx = lively(), tokens(3, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[1:2], model(idx[1:2]))


def test_short_rows_are_the_beginning_of_long_ones():
    model, idx = lively(), tokens(2, 192)
    with torch.no_grad():
        torch.testing.assert_close(model(idx[:, :131]), model(idx)[:, :131])


def test_rows_up_to_ten_times_the_training_length_work_and_longer_ones_are_refused():
    model = GPT(dataclasses.replace(SMALL, sequence_len=8))
    assert model(tokens(1, 80)).shape == (1, 80, 97)
    with pytest.raises(ConfigError, match="longer than the 80 positions"):
        model(tokens(1, 81))


def test_rotation_keeps_lengths_and_products_depend_on_distance_only():
    model = GPT(SMALL)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind()
    q, k = q.expand(1, 192, 1, 8), k.expand(1, 192, 1, 8)
    q, k = (rotate(t, model.cos[:192, None], model.sin[:192, None])[0, :, 0] for t in (q, k))
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(192))
    scores = q @ k.T
    torch.testing.assert_close(scores.diagonal(-5), scores[5, 0].expand(187), atol=1e-4, rtol=1e-4)


def test_norm_gives_unit_mean_square_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((4, 64), 1e-2, dtype=dtype)  # with bfloat16's own epsilon, 2^-7, this would come out near 0.1
        torch.testing.assert_close(norm(x).float(), torch.ones(4, 64), rtol=1e-2, atol=0)


def test_an_untrained_model_pays_log_vocab_per_token():
    """lm_head starts near zero, so that all logits are nearly equal."""
    idx = tokens(2, 64)
    assert GPT(SMALL)(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(97), rel=1e-2)


def test_initial_weights_have_the_stated_spread():
    config = GPTConfig(sequence_len=64, vocab_size=512, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
    weights = GPT(config).state_dict()
    s = (3 / 128) ** 0.5
    assert weights["transformer.wte.weight"].std().item() == pytest.approx(0.8, rel=0.02)
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.02)
    for name, bound in (("attn.c_q", s), ("attn.c_k", s), ("attn.c_v", s), ("mlp.c_fc", 0.4 * s)):
        weight = weights[f"transformer.h.2.{name}.weight"]
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert 0.99 * s < weights["value_embeds.1.weight"].abs().max() <= s
    for name in ("attn.c_proj", "mlp.c_proj"):
        assert not weights[f"transformer.h.0.{name}.weight"].any()
    for gate in (weights["smear_gate.weight"], weights["transformer.h.3.attn.ve_gate.weight"]):
        assert gate.min() >= 0
        assert 0.01 < gate.max() <= 0.02
    torch.testing.assert_close(weights["resid_lambdas"], 1.15 - 0.1 * torch.arange(4) / 3)
    torch.testing.assert_close(weights["x0_lambdas"], 0.2 - 0.15 * torch.arange(4) / 3)
    assert weights["smear_lambda"] == 0
    assert weights["backout_lambda"] == pytest.approx(0.2)


def test_weights_depend_on_the_seed_alone_not_on_how_the_model_came_about():
    direct = GPT(SMALL)
    torch.manual_seed(77)
    with torch.device("meta"):
        late = GPT(SMALL)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    late.init_weights(seed=0)
    half = GPT(SMALL)
    half.set_compute_dtype(torch.bfloat16)
    half.init_weights(seed=0)
    other = GPT(SMALL)
    other.init_weights(seed=1)
    for name, value in direct.state_dict().items():
        assert torch.equal(value, late.state_dict()[name])
        assert torch.equal(value.to(half.state_dict()[name].dtype), half.state_dict()[name])
    assert not torch.equal(direct.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(
        direct.state_dict()["transformer.h.0.attn.c_k.weight"], direct.state_dict()["transformer.h.0.attn.c_v.weight"]
    )
    idx = tokens(1, 20)
    assert torch.equal(direct(idx), late(idx))


def test_a_meta_model_with_loaded_weights_needs_no_initialisation():
    source = lively()
    with torch.device("meta"):
        model = GPT(SMALL)
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    idx = tokens(1, 30)
    assert torch.equal(model(idx), source(idx))


def test_building_a_model_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    GPT(SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_holds_parameters_and_nothing_else():
    model = GPT(SMALL)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)],
)
def test_compute_dtypes_store_what_is_stated_and_stay_near_float32(dtype, stored):
    """The tolerance is a few last places of bfloat16 (2^-8), accumulated over three blocks."""
    model, idx = lively(), tokens(2, 192)
    expected = model(idx[:, :-1], idx[:, 1:])
    model.set_compute_dtype(dtype)
    tables = [model.transformer["wte"].weight, *(table.weight for table in model.value_embeds.values())]
    assert {t.dtype for t in tables} == {stored}
    assert {p.dtype for p in set(model.parameters()) - set(tables)} == {torch.float32}
    assert model.hidden(idx).dtype == dtype
    loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_windows_follow_the_pattern_and_the_last_block_sees_everything():
    config = GPTConfig(n_layer=6, window_pattern="ssl")
    assert config.windows() == [512, 512, None, 512, 512, None]
    assert dataclasses.replace(config, n_layer=5).windows() == [512, 512, None, 512, None]
    assert dataclasses.replace(config, n_layer=1, short_window_ratio=0.5).windows() == [None]
    assert dataclasses.replace(config, n_layer=2, short_window_ratio=0.5).windows()[0] == 1024
    with torch.device("meta"):
        assert GPT(config).window_sizes() == [512, 512, 2048, 512, 512, 2048]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_pattern": "SXL"}, "holds X"),
        ({"window_pattern": ""}, "is empty"),
        ({"n_embd": 16, "n_head": 2, "n_kv_head": 2}, "at least 24"),
        ({"n_kv_head": 3}, "must divide n_head=10"),
        ({"n_head": 7, "n_kv_head": 7}, "Use n_embd=1288"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"short_window_ratio": 0.0}, "above 0"),
    ],
)
def test_impossible_shapes_are_refused_with_the_reason(wrong, message):
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**wrong)


def test_annotated_shapes_hold_at_run_time():
    """jaxtyping and beartype check every annotated call of a forward and backward pass, in a fresh process."""
    code = """
import jaxtyping
with jaxtyping.install_import_hook(["raychat.model", "raychat.optim"], "beartype.beartype"):
    import torch
    from raychat.model import GPT, GPTConfig
    from raychat.optim import build_optimizer
model = GPT(GPTConfig(sequence_len=160, vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, n_embd=32))
optimizer = build_optimizer(model)
idx = torch.arange(322).view(2, 161) % 97
for model.loss_impl in ("full", "chunked"):
    model(idx[:, :-1], idx[:, 1:]).backward()
    optimizer.step()
    with torch.no_grad():
        assert model(idx).shape == (2, 161, 97) and model(idx, idx, "none").shape == (2, 161)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fp8_takes_the_large_matrices_only():
    assert takes_fp8(Linear(512, 2048, device="meta"), "transformer.h.0.mlp.c_fc")
    assert not takes_fp8(Linear(512, 256, device="meta"), "transformer.h.0.attn.c_k")
    assert not takes_fp8(Linear(520, 1024, device="meta"), "transformer.h.0.attn.c_q")
    assert not takes_fp8(Linear(1024, 32768, device="meta"), "lm_head")
    assert not takes_fp8(nn.Embedding(1024, 1024, device="meta"), "transformer.wte")


def test_fp8_is_refused_on_a_cpu_with_the_reason():
    assert "CUDA" in (fp8_capable(torch.device("cpu")) or "")
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        fp8_training(GPT(SMALL))
    with pytest.raises(ConfigError, match="Use one of tensorwise, rowwise"):
        fp8_training(GPT(SMALL), "nonsense")


def test_fp8_layers_keep_names_and_evaluation_computes_without_them():
    """torchao's emulation of the kernels runs on a CPU, so that the swap and its way back can be seen here."""
    from torchao.float8 import Float8LinearConfig

    model = lively(GPTConfig(sequence_len=32, vocab_size=64, n_layer=1, n_head=4, n_kv_head=4, n_embd=512))
    names, idx = list(model.state_dict()), tokens(1, 32, 64)
    with torch.no_grad():
        plain = model(idx)
        count = fp8_module.convert(model, Float8LinearConfig(emulate=True))
        fp8 = model(idx)
        with high_precision(model):
            assert torch.equal(model(idx), plain)
        assert torch.equal(model(idx), fp8)
    assert count == 6  # q, k, v, proj, and both of the MLP
    assert list(model.state_dict()) == names
    assert not torch.equal(fp8, plain)
    assert (fp8 - plain).norm() < 0.1 * plain.norm()  # 3 bits of mantissa, 6 matrices


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_trains_near_bfloat16(recipe):
    device = torch.device("cuda")
    if reason := fp8_capable(device):
        pytest.skip(reason)
    config = GPTConfig(sequence_len=256, vocab_size=512, n_layer=2, n_head=4, n_kv_head=4, n_embd=512)
    model = lively(config).to(device)
    model.set_compute_dtype(torch.bfloat16)
    idx = tokens(4, 257, 512).to(device)
    expected = model(idx[:, :-1], idx[:, 1:]).item()
    fp8_training(model, recipe)
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=2e-2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "flags", [{}, {"depth": 3, "window_pattern": "L"}, {"depth": 5, "num_kv_heads": 1, "vocab_size": 300}]
)
def test_planning_counts_what_the_model_has(flags):
    """The depth dial answers without torch; here its formulas meet the tensors."""
    settings = Config.from_flat({"depth": 4, "aspect_ratio": 32, "head_dim": 32, "max_seq_len": 256} | flags)
    with torch.device("meta"):
        model = GPT(gpt_config(settings))
    shape = model_shape(settings.model)
    counts = param_counts(shape)
    assert model.num_params() == {**dataclasses.asdict(counts), "total": counts.total}
    assert model.flops_per_token() == flops_per_token(shape)
    assert tuple(model.window_sizes()) == shape.windows
