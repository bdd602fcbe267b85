"""Attention on a GPU: kernels without a plan for each shape, and key-value heads repeated where none takes groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from small_models import small_model  # noqa: E402

from trainer import kernels  # noqa: E402


def attended(attend: Any, *, heads: int = 2, mask: Any = None, **named: Any) -> list[Any]:
    """Result and gradients of attention with four query heads."""
    generator = torch.Generator().manual_seed(0)

    class Module:
        num_key_value_groups = 4 // heads
        is_causal = True

    parts = [
        torch.randn(2, count, 9, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (4, heads, heads)
    ]
    result = attend(Module(), *parts, mask, **named)[0]
    return [result, *torch.autograd.grad(result.square().sum(), parts)]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_repeated_heads_give_what_grouped_ones_give(
    heads: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    own = attended(sdpa_attention_forward, heads=heads, scaling=scaling)
    monkeypatch.setattr(kernels, "has_no_grouped_kernel", lambda query: True)
    asked: list[Any] = []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **named: asked.append((k.shape[1], named)) or plain(q, k, v, **named),
    )
    ours = attended(kernels.attention, heads=heads, scaling=scaling)
    (key_heads, named), *_ = asked
    assert key_heads == 4
    assert not named.get("enable_gqa")
    for one, other in zip(own, ours, strict=True):
        torch.testing.assert_close(one, other)


def test_with_a_mask_the_library_repeats_the_heads_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    own = attended(sdpa_attention_forward, mask=mask)
    monkeypatch.setattr(kernels, "has_no_grouped_kernel", lambda query: True)
    for one, other in zip(own, attended(kernels.attention, mask=mask), strict=True):
        torch.testing.assert_close(one, other)


def test_a_cpu_keeps_its_groups() -> None:
    assert not kernels.has_no_grouped_kernel(torch.zeros(1, 1, 1, 1))


def test_it_is_decided_by_the_precision_that_attention_casts_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast with fp32 weights the queries come in fp32; FlashAttention takes the groups all the same."""
    monkeypatch.setattr(kernels, "_grouped", {"half": True, "full": False})
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert kernels.has_no_grouped_kernel(query)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert not kernels.has_no_grouped_kernel(query)
    query.dtype = torch.float64  # which autocast leaves alone
    assert kernels.has_no_grouped_kernel(query)


def test_repeating_heads_breaks_no_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_no_grouped_kernel", lambda query: True)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    parts = [torch.randn(2, heads, 9, 8) for heads in (4, 2, 2)]

    def attend(query: Any, key: Any, value: Any) -> Any:
        return kernels.attention(module, query, key, value, None)[0]

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*parts), attend(*parts))


def test_a_card_before_ampere_has_no_grouped_kernel_in_any_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    class Query:
        def __init__(self, dtype: Any) -> None:
            self.dtype, self.device = dtype, torch.device("cuda")

    monkeypatch.setattr(torch.version, "hip", None)
    was = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for capability, found in (((7, 5), [True, True, True]), ((8, 0), [True, False, False])):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            kernels.settle_kernels()
            kinds = (torch.float32, torch.float16, torch.bfloat16)
            assert [kernels.has_no_grouped_kernel(Query(kind)) for kind in kinds] == found
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        kernels.register.cache_clear()
        kernels._grouped.update(half=True, full=True)


def test_models_take_it_as_their_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = small_model("llama")
    ids = torch.arange(12)[None] % 50
    with torch.no_grad():
        own = model(input_ids=ids).logits
        calls: list[Any] = []
        repeated = kernels._repeated
        monkeypatch.setattr(kernels, "_repeated", lambda *given: calls.append(1) or repeated(*given))
        monkeypatch.setattr(kernels, "has_no_grouped_kernel", lambda query: True)
        kernels.register()
        try:
            ours = model(input_ids=ids).logits
        finally:
            AttentionInterface.register("sdpa", sdpa_attention_forward)
            kernels.register.cache_clear()
    assert calls
    torch.testing.assert_close(ours, own)
