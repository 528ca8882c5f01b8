"""A model of the layout of nanochat (examples/nanochat.py): its attention between our halves."""

from __future__ import annotations

import pytest
import torch

from examples import nanochat


def perturbed(**config: int | str) -> nanochat.GPT:
    torch.manual_seed(0)
    model = nanochat.build(nanochat.Config(**config))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixing" in name or name.endswith("c_proj.weight"):
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def tokens(N: int = 40) -> torch.Tensor:
    return torch.randint(32, (2, N), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pseudo_heads", [1, 2, 3])
def test_an_exact_start_is_the_plain_model(
    pseudo_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perturbed(pseudo_heads=pseudo_heads)
    for block in model.h:
        block.attn.mixing.reset_parameters()
    with torch.no_grad():
        ours = model(tokens())
        # The plain model: its own call, on what was projected.
        mixing = type(model.h[0].attn.mixing)
        monkeypatch.setattr(mixing, "expand", lambda self, q, k, v, **options: (q, k, v))
        monkeypatch.setattr(mixing, "reduce", lambda self, y: y)
        monkeypatch.setattr(
            mixing,
            "flash_window",
            lambda self, window: (-1 if window is None else window - 1, 0),
        )
        plain = model(tokens())
    torch.testing.assert_close(ours, plain, atol=2e-4, rtol=0)
    assert plain.std() > 0.1


def test_decoding_with_its_own_cache_is_the_full_pass() -> None:
    model = perturbed(pseudo_heads=3)
    with torch.no_grad():
        full = model(tokens())
    assert model.window_sizes == [(16, 0)] * 3 + [(-1, 0)]  # shorter than what is decoded
    for prefill in (1, 7, 30):
        decoded = nanochat.decode(model, tokens(), prefill)
        torch.testing.assert_close(decoded, full, atol=2e-4, rtol=0)


def test_it_trains_and_the_mixing_is_not_of_muon() -> None:
    torch.manual_seed(0)
    model = nanochat.build(nanochat.Config(n_layer=2))
    _, muon = model.setup_optimizers()
    of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not any(id(p) in of_muon for name, p in model.named_parameters() if "mixing" in name)
    losses = nanochat.train(model, 25)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
