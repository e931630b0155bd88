"""Compiled by region, a training pass is the same pass: the compiler's front end runs here, its code generator does not."""

import pytest
import torch
from torch import Tensor

from raychat.model import GPT, GPTConfig
from raychat.model.regions import CompiledTraining

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the tracer's own look
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # torch's own imports when it compiles
]
SHAPE = GPTConfig(sequence_len=256, vocab_size=320, n_layer=6, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")


def lively() -> GPT:
    model = GPT(SHAPE)
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(i)), alpha=0.05)
    return model


def rows() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 320, (2, 257), generator=torch.Generator().manual_seed(7))
    return ids[:, :-1], ids[:, 1:]


def gradients(model: GPT) -> list[Tensor]:
    return [param.grad for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_the_regions_make_the_loss_and_the_gradients_of_the_model(loss: str, grad_checkpoint: bool) -> None:
    plain, model = lively(), lively()
    for each in (plain, model):
        each.loss_impl, each.grad_checkpoint = loss, grad_checkpoint
    expected = plain(*rows(), reduction="sum")
    (expected / 512).backward()
    found = CompiledTraining(model, backend="aot_eager")(*rows(), reduction="sum")
    (found / 512).backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-6)


def test_blocks_of_a_kind_share_their_code() -> None:
    """Six blocks of two windows, each with value embeddings or without: as many graphs as there are kinds, and one for each
    part around them."""
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model = lively()
    model.loss_impl = "chunked"
    compiled = CompiledTraining(model, backend=counted)
    compiled(*rows(), reduction="sum").backward()
    kinds = {(block.attn.window, model.config.has_value_embed(i)) for i, block in enumerate(model.transformer["h"])}
    around = 3  # stem, tail, the loss of a chunk
    assert len(graphs) == len(kinds) + around
    compiled(*rows(), reduction="sum").backward()
    assert len(graphs) == len(kinds) + around
