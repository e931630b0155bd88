"""Attention: every back-end against a dense mask, and what a device has."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from raychat.errors import ConfigError
from raychat.model import attention_kernels
from raychat.model.attention import BACKENDS, BLOCK, attend, choose_backend, in_words, prepare, refusals

CPU = torch.device("cpu")


def heads(T: int, n_head: int, n_kv_head: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    shapes = [(2, T, n_head, 8), (2, T, n_kv_head, 8), (2, T, n_kv_head, 8)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """The definition: softmax over all T x T scores of which the forbidden are -inf."""
    T, groups = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(-1) ** 0.5
    lag = torch.arange(T)[:, None] - torch.arange(T)
    seen = (lag >= 0) & (lag <= (T if window is None else window))
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    ("T", "window"),
    [
        (1100, 512),
        (1030, 600),
        (300, 128),
        (384, 128),
        (257, 1),
        (389, 130),
        (300, 0),
        (260, 258),
        (130, 129),
        (100, 128),
        (1, 128),
        (300, None),
    ],
)
def test_attention_equals_the_dense_mask_in_outputs_and_gradients(T, window, n_kv_head):
    """In float64, so that any wrong pair would stand out. T=260 with window 258 hides exactly one pair."""
    inputs = heads(T, 4, n_kv_head)
    weights = torch.randn(2, T, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for attention in (attend, dense):
        y = attention(*inputs, window)
        results.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-10, atol=1e-12)


def test_a_key_moves_exactly_the_queries_that_see_it():
    T, window, j = 2 * BLOCK + 50, 128, 60
    q, k, v = (t.detach() for t in heads(T, 2, 2))
    changed = v.clone()
    changed[:, j] += 1.0
    moved = (attend(q, k, v, window) != attend(q, k, changed, window)).any(-1).any(-1).any(0)
    assert moved.nonzero().flatten().tolist() == list(range(j, j + window + 1))


def fake_flash(q, k, v, *, causal, window_size):
    """The convention of the flash packages: -1 or None is no limit, window (W, 0) sees W + 1 keys."""
    assert causal
    assert window_size[1] == 0
    return dense(q, k, v, None if window_size[0] in (-1, None) else window_size[0])


def fake_varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size, enable_gqa=False):
    """The convention of torch's kernel for packed rows, in rows of one length."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert starts_q.diff().unique().tolist() == [longest_q] == [longest_k]
    assert enable_gqa == (k.size(1) != q.size(1))
    assert window_size[1] == 0
    window_size = (None if window_size[0] == -1 else window_size[0], 0)
    rows = (t.split(starts_q.diff().tolist()) for t in (q, k, v))
    return torch.cat([dense(*(t[None] for t in row), window_size[0])[0] for row in zip(*rows, strict=True)])


@pytest.fixture
def kernels(monkeypatch):
    """All kernels are there: flash and packed rows by the definition, FlexAttention as torch has it, not compiled."""
    fakes = {
        "flash4": lambda *args, **options: (fake_flash(*args, **options), None),
        "flash3": fake_flash,
        "flash2": fake_flash,
        "varlen": fake_varlen,
        "flex": (flex_attention, flex_attention),
    }
    monkeypatch.setattr(attention_kernels, "_loaded", fakes)
    monkeypatch.setattr(attention_kernels, "_masks", {})


@pytest.mark.parametrize("n_kv_head", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize(("T", "window"), [(300, 128), (130, 0), (260, 258), (300, None)])
@pytest.mark.parametrize("name", ["flash4", "flash3", "flash2", "varlen"])
def test_kernels_of_packages_are_asked_for_the_definition(kernels, name, T, window, n_kv_head):
    inputs = heads(T, 4, n_kv_head)
    both = attend(*inputs, window, name), dense(*inputs, window)
    results = [(y, *torch.autograd.grad(y.square().sum(), inputs)) for y in both]
    for ours, definition in zip(*results, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("n_kv_head", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize(("T", "window"), [(300, 128), (130, 0), (260, 258), (300, None)])
def test_the_block_mask_of_flex_is_the_window(kernels, T, window, n_kv_head):
    """Outputs only: FlexAttention has no backward pass on a CPU."""
    q, k, v = (t.detach().float() for t in heads(T, 4, n_kv_head))
    torch.testing.assert_close(attention_kernels.flex(q, k, v, window), dense(q, k, v, window))
    torch.testing.assert_close(attend(q, k, v, window, "flex"), dense(q, k, v, window))


def test_passes_without_gradients_do_not_go_through_flex(kernels, monkeypatch):
    """They have many lengths, for each of which it would be compiled."""
    monkeypatch.setitem(attention_kernels._loaded, "flex", None)
    q, k, v = (t.detach() for t in heads(140, 2, 2))
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v, 7, "flex"), dense(q, k, v, 7))


def test_two_names_are_one_back_end_for_full_context_and_one_for_windows(kernels, monkeypatch):
    q, k, v = (t.detach() for t in heads(140, 2, 2))
    monkeypatch.setitem(BACKENDS, "full", lambda q, k, v, window: q)
    monkeypatch.setitem(BACKENDS, "windows", lambda q, k, v, window: v)
    assert attend(q, k, v, None, "full+windows") is q
    assert attend(q, k, v, 139, "full+windows") is q  # a window that reaches everything is none
    assert attend(q, k, v, 138, "full+windows") is v


def test_a_cpu_gets_sdpa_and_the_reason_is_named():
    name, reason = choose_backend(CPU, torch.float32)
    assert name == "sdpa"
    assert "CUDA" in reason


def test_what_cannot_train_here_says_why(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_loaded", {})
    refused = refusals(["sdpa", "flash2", "varlen", "flex", "flash1"], CPU, torch.bfloat16)
    assert in_words(refused) == (
        "flash2, varlen: needs CUDA, the device is cpu; flex: has no backward pass on cpu; flash1: unknown"
    )
    with pytest.raises(ConfigError, match="flash3 is not on this machine: not installed"):
        prepare("sdpa+flash3", CPU, T=8, windows={None})


def test_a_gpu_takes_the_newest_flash_attention_made_for_it(kernels, monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention_kernels, "version", lambda name: "1.0")
    for capability, name in {(12, 0): "flash4", (9, 0): "flash3", (8, 9): "flash2", (7, 5): "sdpa"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose_backend(cuda, torch.bfloat16)[0] == name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend(cuda, torch.float32) == (
        "sdpa",
        "flash3, flash2: takes bfloat16 and float16, the compute dtype is torch.float32",
    )


def test_a_torch_whose_packed_kernel_knows_no_windows_is_refused(monkeypatch):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False): ...

    monkeypatch.setattr(attention_kernels, "_loaded", {})
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=older))
    with pytest.raises(ConfigError, match="knows no windows"):
        attention_kernels.load("varlen")


@pytest.mark.compile
def test_a_compiled_region_takes_every_kernel_in_one_graph(kernels, monkeypatch):
    """The kernels' packages register operators that a graph can hold; here it is our way to them that must not break it."""
    monkeypatch.setitem(attention_kernels._loaded, "varlen", fake_packed)
    inputs = [t.detach().float() for t in heads(200, 4, 2)]
    prepare("flex", CPU, T=200, windows={None, 50})

    def region(q, k, v):
        ours = [attend(q, k, v, window, "flash3+varlen") for window in (50, None)]
        return sum(ours) + attention_kernels.flex(q, k, v, 50) + attention_kernels.flex(q, k, v, None)

    ours = torch.compile(region, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(ours, 2 * (dense(*inputs, 50) + dense(*inputs, None)))


def fake_packed(q, k, v, starts, _, T, __, *, window_size, enable_gqa=False):
    """As `fake_varlen`, without asking a tensor for its values."""
    q, k, v = (t.unflatten(0, (-1, T)) for t in (q, k, v))
    return fake_flash(q, k, v, causal=True, window_size=window_size).flatten(0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_back_ends_of_a_gpu_agree_in_output_and_gradients(name):
    """Window 0 sees one key: a kernel that counts windows differently would stand out."""
    device = torch.device("cuda", 0)
    if refused := refusals([name], device, torch.bfloat16):
        pytest.skip(in_words(refused))
    for T, window in ((512, None), (512, 128), (450, 130), (300, 0)):
        inputs = [torch.randn(2, T, h, 64, device=device, dtype=torch.bfloat16).requires_grad_() for h in (4, 2, 2)]
        both = attend(*inputs, window, name), attend(*(t.float() for t in inputs), window, "sdpa")
        results = [(y, *torch.autograd.grad(y.float().square().sum(), inputs)) for y in both]
        for ours, definition in zip(*results, strict=True):
            torch.testing.assert_close(ours.float(), definition.float(), rtol=3e-2, atol=3e-2)
