"""The mixing tensors: their starts, their gradients, and folding them away."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from iha import HeadMixing, InterleavedHeadAttention

CAUSALITIES = ["flat", "token", None]
TENSORS = ("alpha_q", "alpha_k", "alpha_v", "collapse")


def bases(
    H: int = 4, G: int = 2, N: int = 9, S: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    S = N if S is None else S
    query, key, value = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((2, H, N, 8), (2, G, S, 8), (2, G, S, 8))
    )
    return query, key, value


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: str | None, window: int | None
) -> Tensor:
    """What a model without IHA computes on the same heads."""
    N, S = query.shape[2], key.shape[2]
    ahead = torch.arange(S - N, S)[:, None] - torch.arange(S)
    mask = torch.ones(N, S, dtype=torch.bool) if causal is None else ahead >= 0
    if window is not None:
        mask = mask & (ahead.abs() < window)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


@settings(max_examples=80, deadline=None)
@given(
    G=st.integers(1, 3),
    groups=st.integers(1, 3),
    P=st.integers(1, 4),
    N=st.integers(1, 9),
    past=st.integers(0, 3),
    causal=st.sampled_from(CAUSALITIES),
    window=st.one_of(st.none(), st.integers(1, 12)),
    per_head=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_upcycle_start_is_plain_attention(
    G: int,
    groups: int,
    P: int,
    N: int,
    past: int,
    causal: Any,
    window: int | None,
    per_head: bool,
    seed: int,
) -> None:
    """However large the noise on the free part, which is not small here."""
    torch.manual_seed(seed)
    mixing = HeadMixing(
        G * groups,
        num_kv_heads=G,
        pseudo_heads=P,
        per_head_collapse=per_head,
        value_noise=1.0,
        query_noise=1.0,
        dtype=torch.float64,
        init="upcycle",
    )
    heads = bases(G * groups, G, N, N + past)
    output = mixing(*heads, causal=causal, window=window)
    assert largest(output - plain_attention(*heads, causal, window)) < 2e-14


def test_the_upcycle_start_has_noise_on_its_free_part() -> None:
    torch.manual_seed(0)
    mixing = HeadMixing(
        32, num_kv_heads=16, pseudo_heads=4, value_noise=0.3, query_noise=0.7, init="upcycle"
    )
    epsilon = mixing.alpha_v - torch.eye(16)[:, :, None]
    free = mixing.alpha_q - torch.eye(32)[:, :, None]
    assert epsilon.std().item() == pytest.approx(0.3 * (3 / 4) ** 0.5, rel=0.05)
    assert largest(epsilon.sum(-1)) < 1e-5
    assert free[..., :-1].std().item() == pytest.approx(0.7, rel=0.05)
    assert largest(free[..., -1]) == 0
    assert torch.equal(mixing.alpha_k, torch.eye(16)[:, :, None].expand(-1, -1, 4))


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("causal", ["token", None])
def test_the_identity_start_is_plain_attention(
    P: int, window: int | None, per_head: bool, causal: Any
) -> None:
    mixing = HeadMixing(
        4,
        num_kv_heads=2,
        pseudo_heads=P,
        init="identity",
        per_head_collapse=per_head,
        dtype=torch.float64,
    )
    heads = bases()
    output = mixing(*heads, causal=causal, window=window)
    assert largest(output - plain_attention(*heads, causal, window)) < 2e-14


@pytest.mark.parametrize("per_head", [False, True])
def test_the_identity_start_is_not_plain_attention_under_flat_causality(per_head: bool) -> None:
    for P in (1, 2, 4):
        torch.manual_seed(0)
        mixing = HeadMixing(
            4, num_kv_heads=2, pseudo_heads=P, init="identity", per_head_collapse=per_head
        )
        query, key, value = (t.float() for t in bases())
        expected = plain_attention(query, key, value, "flat", None)
        error = largest(mixing(query, key, value, causal="flat") - expected)
        assert (error > 0.01) == (P > 1)


@pytest.mark.parametrize("P", [1, 2, 5])
def test_the_scratch_start_keeps_the_variance_and_tells_pseudo_heads_apart(P: int) -> None:
    torch.manual_seed(0)
    H = 64
    mixing = HeadMixing(H, num_kv_heads=H, pseudo_heads=P, init="scratch")
    own = torch.eye(H)[:, :, None]
    for alpha in (mixing.alpha_q, mixing.alpha_k, mixing.alpha_v, P * mixing.collapse):
        # Of independent base heads of variance 1, a pseudo-head has the variance Σ_m α[m]².
        variance = alpha.square().sum(0)
        assert variance.mean().item() == pytest.approx(1, abs=0.05)
        assert variance.std() < 0.25
        # Half of it is its own head.
        others = alpha - own / 2**0.5
        assert others.square().sum(0).mean().item() == pytest.approx(0.5, abs=0.05)
        for p in range(1, P):
            apart = (alpha[..., p] - alpha[..., 0]).square().sum(0)
            assert apart.mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_scratch_start_works_with_any_pseudo_heads(per_head: bool) -> None:
    for P in (1, 3):
        mixing = HeadMixing(
            4,
            num_kv_heads=2,
            pseudo_heads=P,
            init="scratch",
            per_head_collapse=per_head,
            dtype=torch.float64,
        )
        output = mixing(*bases())
        assert output.shape == (2, 4, 9, 8)
        assert output.isfinite().all()


@pytest.mark.parametrize("init", ["upcycle", "scratch"])
@pytest.mark.parametrize("causal", CAUSALITIES)
@pytest.mark.parametrize("per_head", [False, True])
def test_every_pseudo_head_learns_and_none_learns_what_another_does(
    init: Any, causal: Any, per_head: bool
) -> None:
    torch.manual_seed(0)
    P, heads = 3, bases()
    target = torch.randn_like(heads[0])
    mixing = HeadMixing(
        4,
        num_kv_heads=2,
        pseudo_heads=P,
        init=init,
        per_head_collapse=per_head,
        dtype=torch.float64,
    )
    optimizer = torch.optim.SGD(mixing.parameters(), lr=0.5)
    received = {name: torch.zeros_like(getattr(mixing, name)) for name in TENSORS}
    for _ in range(2):
        optimizer.zero_grad()
        (mixing(*heads, causal=causal) - target).square().mean().backward()
        for name, total in received.items():
            total += getattr(mixing, name).grad
        optimizer.step()
    for name, gradient in received.items():
        for p in range(P):
            assert largest(gradient[..., p]) > 1e-6, f"{name}, pseudo-head {p}"
            for q in range(p):
                apart = largest(gradient[..., p] - gradient[..., q])
                assert apart > 1e-6, f"{name}, pseudo-heads {q} and {p}"


def test_without_value_noise_pseudo_keys_would_stay_equal() -> None:
    """Why the start has noise at all: the symmetry that it breaks is a real one."""
    gradients = []
    for noise in (0.0, 0.1):
        torch.manual_seed(0)
        mixing = HeadMixing(
            4,
            num_kv_heads=2,
            pseudo_heads=2,
            value_noise=noise,
            dtype=torch.float64,
            init="upcycle",
        )
        mixing(*bases(), causal="token").square().sum().backward()
        assert mixing.alpha_k.grad is not None
        gradients.append(largest(mixing.alpha_k.grad[..., 0] - mixing.alpha_k.grad[..., 1]))
    assert gradients[0] < 1e-12
    assert gradients[1] > 1e-3


@pytest.mark.parametrize(("H", "G", "P"), [(8, 2, 4), (6, 6, 1), (3, 1, 5)])
def test_parameter_count(H: int, G: int, P: int) -> None:
    assert (
        HeadMixing(H, num_kv_heads=G, pseudo_heads=P, init="upcycle").parameter_count()
        == H * H * P + 2 * G * G * P + H * H * P
    )
    per_head = HeadMixing(H, num_kv_heads=G, pseudo_heads=P, per_head_collapse=True, init="upcycle")
    assert per_head.parameter_count() == H * H * P + 2 * G * G * P + H * P


def test_key_value_heads_are_as_many_as_heads_by_default() -> None:
    mixing = HeadMixing(6, init="upcycle")
    assert (mixing.num_kv_heads, mixing.pseudo_heads) == (6, 2)
    assert mixing.alpha_k.shape == (6, 6, 2)


def test_repr_says_the_sizes() -> None:
    assert repr(HeadMixing(8, num_kv_heads=2, pseudo_heads=4, init="scratch")) == (
        "HeadMixing(num_heads=8, num_kv_heads=2, pseudo_heads=4, init='scratch', parameters=544)"
    )
    assert "per_head_collapse=True, parameters=24)" in repr(
        HeadMixing(2, num_kv_heads=1, pseudo_heads=3, per_head_collapse=True, init="upcycle")
    )


def projections(H: int, G: int, d: int, bias: bool) -> list[nn.Linear]:
    E = 12
    sizes = ((E, H * d), (E, G * d), (E, G * d), (H * d, E))
    return [nn.Linear(i, o, bias, dtype=torch.float64) for i, o in sizes]


def through(mixing: HeadMixing, linears: list[nn.Linear], x: Tensor, d: int) -> Tensor:
    *inputs, o_proj = linears
    heads = [linear(x).unflatten(2, (-1, d)).transpose(1, 2) for linear in inputs]
    return o_proj(mixing(*heads).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1)])
def test_folding_one_pseudo_head_leaves_the_function(
    H: int, G: int, per_head: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    d = 6
    linears, x = projections(H, G, d, bias), torch.randn(2, 7, 12, dtype=torch.float64)
    mixing = HeadMixing(
        H,
        num_kv_heads=G,
        pseudo_heads=1,
        per_head_collapse=per_head,
        dtype=torch.float64,
        init="upcycle",
    )
    for parameter in mixing.parameters():
        nn.init.normal_(parameter)
    before, kept = through(mixing, linears, x, d), copy.deepcopy(linears)
    mixing.fold_(*linears)
    torch.testing.assert_close(through(mixing, linears, x, d), before, atol=1e-12, rtol=1e-12)
    # It is the projections that changed, and plain attention that is left.
    assert not torch.equal(linears[0].weight, kept[0].weight)
    heads = bases(H, G)
    assert largest(mixing(*heads) - plain_attention(*heads, "flat", None)) < 2e-14
    assert mixing.init == "identity"


def test_folding_more_than_one_pseudo_head_is_refused() -> None:
    linears, mixing = (
        projections(4, 2, 6, True),
        HeadMixing(4, num_kv_heads=2, pseudo_heads=2, init="upcycle"),
    )
    before = copy.deepcopy((linears, mixing.state_dict()))
    with pytest.raises(ValueError, match=r"^fold_ needs pseudo_heads = 1, got 2"):
        mixing.fold_(*linears)
    assert_untouched(before, linears, mixing)


@pytest.mark.parametrize("wrong", range(4))
def test_folding_into_projections_of_other_heads_is_refused(wrong: int) -> None:
    linears = projections(4, 4, 6, True)
    linears[wrong] = nn.Linear(7, 7)
    mixing = HeadMixing(4, num_kv_heads=4, pseudo_heads=1, init="scratch", dtype=torch.float64)
    before = copy.deepcopy((linears, mixing.state_dict()))
    name = ("q_proj", "k_proj", "v_proj", "o_proj")[wrong]
    with pytest.raises(ValueError, match=f"^{name} has 7 features, which 4 heads do not divide"):
        mixing.fold_(*linears)
    assert_untouched(before, linears, mixing)


def assert_untouched(before: Any, linears: list[nn.Linear], mixing: HeadMixing) -> None:
    kept, tensors = before
    for old, new in zip(kept, linears, strict=True):
        assert torch.equal(old.weight, new.weight)
        assert torch.equal(old.bias, new.bias)
    assert all(torch.equal(tensors[name], getattr(mixing, name)) for name in TENSORS)


@pytest.mark.parametrize("init", ["upcycle", "scratch", "identity"])
@pytest.mark.parametrize("per_head", [False, True])
def test_it_can_be_built_without_memory_and_filled_later(init: Any, per_head: bool) -> None:
    mixing = HeadMixing(
        4, num_kv_heads=2, pseudo_heads=3, init=init, per_head_collapse=per_head, device="meta"
    )
    assert all(p.is_meta for p in mixing.parameters())
    filled = mixing.to_empty(device="cpu")
    for parameter in filled.parameters():
        nn.init.constant_(parameter, float("nan"))
    filled.reset_parameters()
    assert all(p.isfinite().all() for p in filled.parameters())


def test_a_saved_state_loads_into_another_start() -> None:
    saved, other = (
        HeadMixing(4, num_kv_heads=2, pseudo_heads=3, init="scratch"),
        HeadMixing(4, num_kv_heads=2, pseudo_heads=3, init="identity"),
    )
    assert tuple(saved.state_dict()) == TENSORS
    other.load_state_dict(saved.state_dict())
    heads = [t.float() for t in bases()]
    assert torch.equal(saved(*heads), other(*heads))


@pytest.mark.parametrize("init", ["upcycle", "scratch", "identity"])
def test_half_precision(init: Any) -> None:
    torch.manual_seed(0)
    mixing = HeadMixing(4, num_kv_heads=2, pseudo_heads=3, init=init, dtype=torch.bfloat16)
    assert {p.dtype for p in mixing.parameters()} == {torch.bfloat16}
    heads = [t.bfloat16() for t in bases()]
    output = mixing(*heads, causal="token")
    assert output.dtype == torch.bfloat16
    exact = mixing.double()(*(t.double() for t in heads), causal="token")
    torch.testing.assert_close(output.double(), exact, atol=0.05, rtol=0.05)


def test_arguments_of_the_operator_are_passed_on() -> None:
    mixing, heads = (
        HeadMixing(4, num_kv_heads=2, pseudo_heads=2, init="scratch", dtype=torch.float64),
        bases(),
    )
    plain = mixing(*heads)
    for argument in ({"causal": None}, {"window": 2}, {"scale": 0.1}):
        assert not torch.allclose(mixing(*heads, **argument), plain)
    with pytest.raises(ValueError, match=r"^backend must be one of"):
        mixing(*heads, backend="none")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 2), "num_heads must be at least 1, got 0"),
        ((4, 0, 2), "num_kv_heads must be at least 1, got 0"),
        ((4, -2, 2), "num_kv_heads must be at least 1, got -2"),
        ((4, 2, 0), "pseudo_heads must be at least 1, got 0"),
        ((4, 3, 2), "num_kv_heads must divide num_heads, got 3 and 4"),
        ((4, 8, 2), "num_kv_heads must divide num_heads, got 8 and 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    H, G, P = sizes
    with pytest.raises(ValueError, match=f"^{message}"):
        HeadMixing(H, num_kv_heads=G, pseudo_heads=P, init="upcycle")


def test_sizes_after_the_number_of_heads_are_named() -> None:
    """`HeadMixing(8, 4)` would be G = 4 here and P = 4 of the layer."""
    with pytest.raises(TypeError, match="positional"):
        HeadMixing(8, 4, init="upcycle")  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        InterleavedHeadAttention(64, 8, 4, init="scratch")  # type: ignore[misc]


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^init must be one of .*'scratch'.*got 'random'"):
        HeadMixing(4, init="random")  # type: ignore[arg-type]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("init", ["upcycle", "scratch", "identity"])
def test_unread_pseudo_queries_can_go(init: Any, per_head: bool) -> None:
    """The start of upcycling reads the last one alone."""
    mixing = HeadMixing(4, num_kv_heads=2, pseudo_heads=3, init=init, per_head_collapse=per_head)
    query, key, value = torch.randn(2, 4, 7, 8), *torch.randn(2, 2, 2, 7, 8)
    before = mixing(query, key, value)
    assert mixing.drop_unread_() == (1 if init == "upcycle" else 3)
    torch.testing.assert_close(mixing(query, key, value), before)
    same = HeadMixing(
        4,
        num_kv_heads=2,
        pseudo_heads=3,
        pseudo_queries=mixing.pseudo_queries,
        per_head_collapse=per_head,
        init="upcycle",
    )
    same.load_state_dict(mixing.state_dict())
    torch.testing.assert_close(same(query, key, value), before)


@pytest.mark.parametrize("causal", ["flat", "token", None])
@pytest.mark.parametrize("pseudo_queries", [1, 2])
def test_upcycling_is_exact_with_fewer_pseudo_queries(pseudo_queries: int, causal: Any) -> None:
    mixing = HeadMixing(4, pseudo_heads=3, pseudo_queries=pseudo_queries, init="upcycle")
    given = torch.randn(3, 2, 4, 7, 8)
    plain = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=causal is not None)
    torch.testing.assert_close(mixing(*given, causal=causal), plain)


@pytest.mark.parametrize(("P", "share"), [(2, 0.7), (4, 0.6), (8, 0.5)])
def test_the_output_of_scratch_is_as_small_as_its_docstring_says(P: int, share: float) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 8, 64, 32)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    with torch.no_grad():
        mixings = [HeadMixing(8, pseudo_heads=P, init="scratch") for _ in range(8)]
        outputs = torch.stack([mixing(query, key, value) for mixing in mixings])
    assert outputs.square().mean().sqrt() / plain.square().mean().sqrt() == pytest.approx(
        share, abs=0.08
    )
