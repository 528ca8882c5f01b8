"""The whole layer: against plain attention, hand-rotated virtual tokens, and with a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from iha import InterleavedHeadAttention, KeyValueCache, interleaved_head_attention
from iha.rotary import inverse_frequencies, rotary_tables, rotate

ROPES = ["virtual", "token", "fractional", None]
ropes = st.sampled_from(ROPES)


def layer(P: int = 3, G: int | None = 2, **options: Any) -> InterleavedHeadAttention:
    torch.manual_seed(0)
    given = {
        "pseudo_heads": P,
        "init": "scratch",
        "num_kv_heads": G,
        "dtype": torch.float64,
        **options,
    }
    return InterleavedHeadAttention(24, 4, **given)


def tokens(N: int = 9, B: int = 2, E: int = 24, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(B, N, E, dtype=torch.float64, generator=random)


def close(output: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=0)


# --- What it computes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", ["flat", "token", None])
def test_one_identical_pseudo_head_is_multi_head_attention(bias: bool, causal: Any) -> None:
    ours = layer(1, None, bias=bias, init="identity", rope=None, causal=causal)
    theirs = nn.MultiheadAttention(24, 4, bias=bias, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
        )
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        if bias:
            theirs.in_proj_bias.copy_(
                torch.cat([p.bias for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
            )
            theirs.out_proj.bias.copy_(ours.o_proj.bias)
    x = tokens()
    hidden = None if causal is None else torch.ones(9, 9, dtype=torch.bool).triu(1)
    close(ours(x), theirs(x, x, x, attn_mask=hidden, need_weights=False)[0])


@pytest.mark.parametrize("bias", [False, True])
def test_the_projections_have_a_bias_only_if_asked(bias: bool) -> None:
    built = layer(bias=bias)
    for linear in (built.q_proj, built.k_proj, built.v_proj, built.o_proj):
        assert (linear.bias is not None) == bias


def by_hand(built: InterleavedHeadAttention, x: Tensor, *, qk_norm: bool = False) -> Tensor:
    """Every virtual token is mixed first and rotated at its own position, then all attend."""
    mixing, d = built.head_mixing, built.head_dim
    H, P, N = mixing.num_heads, mixing.pseudo_heads, x.shape[1]

    def heads(linear: nn.Linear) -> Tensor:
        return linear(x).view(x.shape[0], N, -1, d).transpose(1, 2)

    query, key, value = heads(built.q_proj), heads(built.k_proj), heads(built.v_proj)
    if qk_norm:
        query = rms_norm(query, (d,), built.q_norm.weight)  # type: ignore[arg-type]
        key = rms_norm(key, (d,), built.k_norm.weight)  # type: ignore[arg-type]
    query, key, value = (
        torch.einsum("bmnd,mhp->bhnpd", base, alpha).flatten(2, 3)
        for base, alpha in (
            (query, mixing.alpha_q),
            (key, mixing.alpha_k),
            (value, mixing.alpha_v),
        )
    )
    i = torch.arange(N * P)
    positions = {"virtual": i, "token": i // P, "fractional": i // P + (i % P) / P}
    if built.rope is not None:
        frequencies = inverse_frequencies(d, built.rope_base)
        tables = rotary_tables(positions[built.rope], frequencies)
        query, key = (rotate(heads, tables, built.rotary) for heads in (query, key))
    key, value = (t.repeat_interleave(H // mixing.num_kv_heads, 1) for t in (key, value))
    scores = query @ key.mT / d**0.5
    scores = scores.masked_fill(i[:, None] < i, float("-inf"))
    pseudo = (scores.softmax(-1) @ value).view(-1, H, N, P, d)
    output = torch.einsum("bhnpd,ohp->bnod", pseudo, mixing.collapse)
    return built.o_proj(output.flatten(2))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("rotary", ["half", "pairs"])
@pytest.mark.parametrize("G", [4, 2, 1])
def test_every_virtual_token_has_its_position(rope: Any, rotary: Any, G: int) -> None:
    built = layer(3, G, rope=rope, rotary=rotary, rope_base=100.0)
    # The tables are in float32: angles at n·P and p add up to the one at n·P + p to that.
    close(built(tokens()), by_hand(built, tokens()), 1e-5)


def test_the_rope_modes_and_conventions_differ() -> None:
    outputs = [layer(rope=rope)(tokens()) for rope in ROPES]
    outputs.append(layer(rope="virtual", rotary="pairs")(tokens()))
    outputs.append(layer(rope="virtual", rope_base=100.0)(tokens()))
    for i, output in enumerate(outputs):
        for other in outputs[:i]:
            assert (output - other).abs().max() > 1e-3


def test_queries_and_keys_are_normed_before_they_turn() -> None:
    built = layer(qk_norm=True)
    with torch.no_grad():
        for norm in (built.q_norm, built.k_norm):
            norm.weight.copy_(torch.linspace(0.5, 3, 6))
    close(built(tokens()), by_hand(built, tokens(), qk_norm=True), 1e-5)
    assert (built(tokens()) - by_hand(built, tokens())).abs().max() > 1e-3


def test_a_norm_that_autocast_keeps_in_float32_does_no_harm() -> None:
    built, x = layer(qk_norm=True, dtype=torch.bfloat16), tokens().bfloat16()
    expected = built(x)
    for norm in (built.q_norm, built.k_norm):
        norm.register_forward_hook(lambda *arguments: arguments[-1].float())
    assert torch.equal(built(x), expected)


@pytest.mark.parametrize("window", [None, 3])
def test_autocast_computes_in_half_precision(window: int | None) -> None:
    built = layer(dtype=torch.float32, window=window)
    x = tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        output = built(x)
    assert output.dtype == torch.bfloat16
    assert 0 < (output.float() - built(x)).abs().max() < 0.05


def test_a_head_dimension_of_its_own() -> None:
    built = layer(head_dim=10)
    assert built.q_proj.out_features == built.o_proj.in_features == 40
    assert built.k_proj.out_features == 20
    close(built(tokens()), by_hand(built, tokens()), 1e-5)


@pytest.mark.parametrize("init", ["upcycle", "scratch", "identity"])
def test_the_start_and_collapse_are_passed_on(init: Any) -> None:
    built = layer(init=init, per_head_collapse=True)
    assert built.head_mixing.init == init
    assert built.head_mixing.collapse.shape == (4, 3)
    assert built(tokens()).isfinite().all()


# --- Which tokens see which


@pytest.mark.parametrize("S", [3, 9, 14])
def test_cross_attention_reads_the_context_alone(S: int) -> None:
    built = layer(causal=None, rope=None, context_dim=10)
    x, context = tokens(), tokens(S, E=10)
    mask = torch.rand(2, 1, 9, S, generator=torch.Generator().manual_seed(0)) < 0.6
    output = built(x, context, attn_mask=mask)

    def heads(linear: nn.Linear, source: Tensor) -> Tensor:
        return linear(source).unflatten(2, (-1, 6)).transpose(1, 2)

    attended = interleaved_head_attention(
        heads(built.q_proj, x),
        heads(built.k_proj, context),
        heads(built.v_proj, context),
        *(
            built.head_mixing.alpha_q,
            built.head_mixing.alpha_k,
            built.head_mixing.alpha_v,
            built.head_mixing.collapse,
        ),
        attn_mask=mask,
        causal=None,
        backend="reference",
    )
    close(output, built.o_proj(attended.transpose(1, 2).flatten(2)))
    # What the mask hides is not read, and the order of the context does not matter.
    order = torch.randperm(S)
    close(built(x, context[:, order], attn_mask=mask[..., order]), output)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("causal", "window"), [("flat", None), ("token", 3), (None, 4)])
def test_packed_documents_are_as_if_alone(rope: Any, causal: Any, window: int | None) -> None:
    built, x = layer(rope=rope, causal=causal, window=window), tokens(11)
    ids = torch.tensor([[0] * 4 + [1] * 7] * 2)
    packed = built(x, document_ids=ids)
    alone = torch.cat([built(x[:, :4]), built(x[:, 4:])], dim=1)
    close(packed, alone, 1e-5)  # rotary angles in float32
    assert (built(x) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("rope", ROPES)
def test_left_padding_is_as_if_not_there(rope: Any) -> None:
    built, x = layer(rope=rope), tokens(11)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[0, :4] = False
    output = built(x, attn_mask=real[:, None, None, :])
    close(output[:1, 4:], built(x[:1, 4:]), 1e-5)
    close(output[1:], built(x[1:]))
    assert (output[0, :4] == 0).all()  # a padding token sees nothing


# --- The cache


@settings(max_examples=40, deadline=None)
@given(
    rope=ropes,
    causal=st.sampled_from(["flat", "token"]),
    window=st.one_of(st.none(), st.integers(1, 6)),
    capacity=st.sampled_from([None, 11, 20]),
    cuts=st.lists(st.integers(1, 4), min_size=1),
    qk_norm=st.booleans(),
)
@torch.no_grad()
def test_decoding_in_chunks_is_the_full_pass(
    rope: Any,
    causal: Any,
    window: int | None,
    capacity: int | None,
    cuts: list[int],
    qk_norm: bool,
) -> None:
    built, x = layer(rope=rope, causal=causal, window=window, qk_norm=qk_norm), tokens(11)
    cache, steps, start = KeyValueCache(capacity), [], 0
    while start < 11:
        chunk = x[:, start : start + cuts[len(steps) % len(cuts)]]
        steps.append(built(chunk, cache=cache))
        start += chunk.shape[1]
        assert cache.length == start
    close(torch.cat(steps, dim=1), built(x))


@pytest.mark.parametrize("capacity", [None, 16])
@torch.no_grad()
def test_decoding_with_padding_and_documents(capacity: int | None) -> None:
    built, x = layer(), tokens(8)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[0, ..., :2] = False
    full = built(x, attn_mask=mask, document_ids=ids)
    cache = KeyValueCache(capacity)
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        step = built(
            x[:, start:stop],
            attn_mask=mask[..., :stop],
            document_ids=ids[:, :stop],
            cache=cache,
        )
        close(step, full[:, start:stop])


@pytest.mark.parametrize("capacity", [None, 9])
@torch.no_grad()
def test_the_cache_is_one_of_base_heads(capacity: int | None) -> None:
    sizes = {}
    for P in (1, 4):
        cache = KeyValueCache(capacity)
        layer(P)(tokens(), cache=cache)
        assert cache.key is not None
        assert cache.value is not None
        assert cache.key.shape == cache.value.shape == (2, 2, 9, 6)
        sizes[P] = cache.key.nbytes + cache.value.nbytes
    assert sizes[4] == sizes[1] == 2 * (2 * 2 * 9 * 6) * 8
    # One of pseudo-heads would hold G·P a token.
    pseudo = interleaved_keys(layer(4), tokens())
    assert 2 * pseudo.nbytes == 4 * sizes[4]


def interleaved_keys(built: InterleavedHeadAttention, x: Tensor) -> Tensor:
    key = built.k_proj(x).unflatten(2, (-1, built.head_dim)).transpose(1, 2)
    return torch.einsum("bmnd,mgp->bgnpd", key, built.head_mixing.alpha_k)


@torch.no_grad()
def test_a_capacity_is_allocated_once() -> None:
    built, cache = layer(), KeyValueCache(capacity=9)
    built(tokens(2), cache=cache)
    assert cache.key is not None
    before = cache.key.data_ptr()
    built(tokens(7), cache=cache)
    assert cache.key.shape[2] == 9
    assert cache.key.data_ptr() == before


@torch.no_grad()
def test_a_full_cache_refuses_and_stays_as_it_was() -> None:
    built, cache, x = layer(), KeyValueCache(capacity=6), tokens()
    built(x[:, :5], cache=cache)
    with pytest.raises(ValueError, match=r"^cache is full: it holds 5 of 6 tokens and 2 more came"):
        built(x[:, 5:7], cache=cache)
    assert cache.length == 5
    close(built(x[:, 5:6], cache=cache), built(x[:, :6])[:, 5:])


@pytest.mark.parametrize("capacity", [None, 20])
@torch.no_grad()
def test_a_cache_of_another_batch_or_layer_is_refused(capacity: int | None) -> None:
    cache = KeyValueCache(capacity)
    layer()(tokens(3), cache=cache)
    held = rf"^cache holds keys of shape \(2, 2, {capacity or 3}, 6\), and "
    with pytest.raises(ValueError, match=held + r"\(1, 2, 4, 6\) came"):
        layer()(tokens(4, B=1), cache=cache)
    with pytest.raises(ValueError, match=held + r"\(2, 4, 4, 6\) came"):
        layer(G=4)(tokens(4), cache=cache)
    with pytest.raises(ValueError, match=held + r"\(2, 2, 4, 8\) came"):
        layer(head_dim=8)(tokens(4), cache=cache)
    assert cache.length == 3


@pytest.mark.parametrize("capacity", [None, 9])
@torch.no_grad()
def test_a_cache_can_be_used_again_after_a_reset(capacity: int | None) -> None:
    built, cache = layer(), KeyValueCache(capacity)
    built(tokens(), cache=cache)
    cache.reset()
    assert (cache.length, cache.key, cache.value) == (0, None, None)
    x = tokens(B=3, seed=2)
    close(built(x, cache=cache), built(x))


def test_gradients_flow_through_a_growing_cache() -> None:
    gradients = []
    for cuts in ((9,), (4, 5)):
        built, cache = layer(), KeyValueCache()
        steps = [built(part, cache=cache) for part in tokens().split(cuts, dim=1)]
        torch.cat(steps, dim=1).square().sum().backward()
        gradients.append([p.grad for p in built.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@settings(max_examples=40, deadline=None)
@given(
    rope=ropes,
    causal=st.sampled_from(["flat", "token"]),
    window=st.integers(1, 5),
    more=st.integers(0, 2),
    cuts=st.lists(st.integers(1, 6), min_size=1),
    masked=st.booleans(),
)
@torch.no_grad()
def test_a_cache_with_a_window_keeps_what_the_window_needs(
    rope: Any, causal: Any, window: int, more: int, cuts: list[int], masked: bool
) -> None:
    built, x = layer(rope=rope, causal=causal, window=window), tokens(23)
    masks: dict[str, Tensor] = {}
    if masked:
        random = torch.Generator().manual_seed(0)
        masks["attn_mask"] = torch.rand(2, 1, 1, 23, generator=random) < 0.7
        masks["document_ids"] = (torch.arange(23) > 12).int().expand(2, -1)
    cache, steps, start = KeyValueCache(window=window + more), [], 0
    while start < 23:
        chunk = x[:, start : start + cuts[len(steps) % len(cuts)]]
        start += chunk.shape[1]
        so_far = {name: given[..., :start] for name, given in masks.items()}
        steps.append(built(chunk, cache=cache, **so_far))
        assert cache.length == start
        for kept in (cache.key, cache.value):
            assert kept is not None
            assert kept.shape[2] == min(start, window + more + 1)
            assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    close(torch.cat(steps, dim=1), built(x, **masks))


@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_that_keeps_less_than_the_layer_sees_is_refused(window: int | None) -> None:
    cache = KeyValueCache(window=3)
    with pytest.raises(ValueError, match=rf"^cache keeps a window of 3 tokens, .* got {window}"):
        layer(window=window)(tokens(), cache=cache)
    assert cache.length == 0
    with pytest.raises(ValueError, match=r"^give capacity or window, got 9 and 3"):
        KeyValueCache(9, window=3)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_capacity_below_one_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"^capacity must be at least 1, got {capacity}"):
        KeyValueCache(capacity)


@torch.no_grad()
def test_a_cache_says_how_full_it_is() -> None:
    cache = KeyValueCache(capacity=20)
    layer()(tokens(), cache=cache)
    assert repr(cache) == "KeyValueCache(length=9, capacity=20)"


# --- As a module


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_layer_without_memory_is_filled_later(qk_norm: bool) -> None:
    built = layer(bias=True, qk_norm=qk_norm, device="meta").to_empty(device="cpu")
    for parameter in built.parameters():
        nn.init.constant_(parameter, 1e21)
    built.reset_parameters()
    torch.manual_seed(0)
    again = layer(bias=True, qk_norm=qk_norm)
    for name, parameter in built.named_parameters():
        assert parameter.abs().max() < 10
        expected = again.get_parameter(name)
        torch.testing.assert_close(parameter.std(), expected.std(), atol=0.2, rtol=0.5)
    assert built(tokens()).isfinite().all()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("per_head", [False, True])
def test_every_parameter_and_the_input_receive_a_gradient(
    rope: Any, window: int | None, per_head: bool
) -> None:
    built = layer(rope=rope, window=window, per_head_collapse=per_head, bias=True, qk_norm=True)
    x = tokens().requires_grad_()
    built(x).square().sum().backward()
    received = {"x": x.grad, **{name: p.grad for name, p in built.named_parameters()}}
    assert len(received) == 1 + 4 + 8 + 2
    for name, gradient in received.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 1e-9, name


def test_dropout_drops_in_training_only() -> None:
    built, x = layer(dropout=0.5), tokens()
    expected = layer()(x)
    assert not torch.allclose(built.train()(x), expected)
    assert not torch.equal(built(x), built(x))
    close(built.eval()(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"rope": "virtual"},
        {"rope": "token", "window": 3},
        {"rope": None, "causal": None, "qk_norm": True, "bias": True},
        {"rope": "fractional", "backend": "reference", "per_head_collapse": True},
    ],
    ids=str,
)
def test_the_whole_layer_is_one_graph(options: dict[str, Any]) -> None:
    built, x = layer(**options), tokens()
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    close(output, built(x))
    output.sum().backward()
    assert all(p.grad is not None for p in built.parameters())


@torch.no_grad()
def test_far_positions_stay_precise_in_half_precision() -> None:
    """Casting the module must not round the rotary frequencies: at 3·3000 that is many radians."""
    exact, x = layer(dtype=torch.float32), tokens(3000, B=1).float()
    cast = copy.deepcopy(exact).to(torch.bfloat16)
    expected, cache = KeyValueCache(), KeyValueCache()
    exact(x, cache=expected)
    cast(x.bfloat16(), cache=cache)
    assert cache.key is not None
    assert expected.key is not None
    assert cache.key.dtype == torch.bfloat16
    error = (cache.key.float() - expected.key).abs()
    assert error[:, :, -100:].max() < 0.05
    assert expected.key[:, :, -100:].abs().max() > 1


def test_the_layer_on_a_device_without_memory() -> None:
    for built in (layer(device="meta", qk_norm=True), layer(qk_norm=True).to("meta")):
        assert all(p.is_meta for p in built.parameters())
        output = built(tokens().to("meta"))
        assert output.is_meta
        assert output.shape == (2, 9, 24)


def test_the_dtype_is_that_of_every_parameter_but_the_mixing() -> None:
    built = layer(dtype=torch.float16, bias=True, qk_norm=True)
    assert {p.dtype for p in built.head_mixing.parameters()} == {torch.float32}
    rest = {p.dtype for name, p in built.named_parameters() if "mixing" not in name}
    assert rest == {torch.float16}


def test_a_saved_state_loads_into_another_layer() -> None:
    saved = layer(qk_norm=True, bias=True)
    other = layer(qk_norm=True, bias=True)
    torch.manual_seed(1)
    other.head_mixing.reset_parameters()
    assert not torch.allclose(other(tokens()), saved(tokens()))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other(tokens()), saved(tokens()))


def test_repr_says_what_it_does() -> None:
    said = repr(layer(window=5, backend="local"))
    assert "causal='flat', window=5, rope='virtual', backend='local'" in said
    assert "pseudo_heads=3" in said


def test_the_backend_is_the_one_named() -> None:
    close(layer(backend="reference")(tokens()), layer(backend="streamed:sdpa")(tokens()))
    with pytest.raises(ValueError, match=r"^backend 'local' cannot run this call"):
        layer(backend="local")(tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 25}, "num_heads must divide embed_dim .* got 4 and 25"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"pseudo_heads": 0}, "pseudo_heads must be at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3 and 4"),
        ({"embed_dim": 12}, "head_dim must be even for rope='virtual', got 3"),
        ({"rope": "yarn"}, "rope must be one of .*'virtual'.* got 'yarn'"),
        ({"rope_base": 0}, "rope_base must be a finite number at least 1, got 0"),
        ({"causal": True}, "causal must be one of .*'flat'.* got True"),
        ({"rotary": "neox"}, "rotary must be one of .*'half'.* got 'neox'"),
        ({"init": "zeros"}, "init must be one of .* got 'zeros'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be a finite number at least 0 and below 1, got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        InterleavedHeadAttention(
            **{"embed_dim": 24, "num_heads": 4, "pseudo_heads": 2, "init": "scratch", **options}
        )


def test_tokens_of_another_shape_are_refused() -> None:
    built = layer(2, context_dim=16, causal=None, rope=None)
    for x, context, message in (
        (torch.randn(9, 24), None, r"x must have shape \(batch, tokens, 24\), got \(9, 24\)"),
        (torch.randn(2, 9, 8), None, r"x must have shape .* 24\), got \(2, 9, 8\)"),
        (tokens(), None, r"context must be given: .* width 16"),
        (tokens(), torch.randn(2, 5, 24), r"context must have shape .* 16\)"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            built(x, context)


def test_an_odd_head_dimension_needs_no_positions() -> None:
    built = InterleavedHeadAttention(
        12, 4, pseudo_heads=2, rope=None, dtype=torch.float64, init="scratch"
    )
    assert built(tokens(E=12)).shape == (2, 9, 12)


@pytest.mark.parametrize("options", [{"causal": "flat"}, {"window": 3}, {"rope": "token"}], ids=str)
def test_context_needs_a_layer_without_positions(options: dict[str, Any]) -> None:
    built = layer(**{"causal": None, "rope": None, **options})
    (name, value) = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^context needs a layer .*{name}={value!r}"):
        built(tokens(), tokens(5))


def test_context_goes_with_neither_a_cache_nor_documents() -> None:
    built = layer(causal=None, rope=None)
    with pytest.raises(ValueError, match=r"^cache holds the tokens of x that came before"):
        built(tokens(), tokens(5), cache=KeyValueCache())
    with pytest.raises(ValueError, match=r"^document_ids number the tokens of one sequence"):
        built(tokens(), tokens(), document_ids=torch.zeros(2, 9, dtype=torch.long))
