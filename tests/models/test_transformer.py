"""The dense Transformer against another implementation, and the properties that training and decoding rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from trainkit.optimizers import split_parameters
from transformerlm.models.build import create_model
from transformerlm.models.cache import KeyValueCache
from transformerlm.models.sizes import flops_per_token
from transformerlm.models.specs import AttentionBackend, TransformerSpec
from transformerlm.models.transformer import RMSNorm, Transformer

VOCAB = 100


def small_spec(**changes: Any) -> TransformerSpec:
    values = {"context_length": 24, "num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 48}
    return TransformerSpec(**(values | changes))


def small_model(**changes: Any) -> Transformer:
    """float64, with weights large enough that every part matters."""
    model = create_model(small_spec(**changes), vocab_size=VOCAB, seed=3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.arange(len(parameter)).cos())
    return model


def some_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# -- against transformers ----------------------------------------------------------------------------------------------


class ExactRotary(torch.nn.Module):
    """The rotary tables of `transformers`, which computes them in 32 bits, in 64."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids.unsqueeze(-1) * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


class ExactNorm(torch.nn.Module):
    """The norm of `transformers`, which computes in 32 bits, in 64."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt()


def reference_model(model: Transformer) -> Any:
    """Llama, or Qwen3 for QK-norm, with the weights of `model`."""
    spec = model.spec
    config_class, model_class = (
        (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)
        if spec.qk_norm
        else (transformers.LlamaConfig, transformers.LlamaForCausalLM)
    )
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=spec.d_model,
        intermediate_size=spec.ff_width,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context_length,
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tie_embeddings,
        attn_implementation="sdpa",
    )
    reference = model_class(config).double()
    reference.load_state_dict(renamed(model, {n: p.detach() for n, p in model.named_parameters()}))
    reference.model.rotary_emb = ExactRotary(spec.head_dim, spec.rope_theta)
    for name, module in list(reference.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, attribute = name.rpartition(".")
            setattr(reference.get_submodule(parent), attribute, ExactNorm(module))
    return reference


def renamed(model: Transformer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters (or their gradients) under the names of `transformers`, fused matrices taken apart."""
    spec = model.spec
    names = {"attention.output": "self_attn.o_proj", "feed_forward.down": "mlp.down_proj"}
    names |= {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    names |= {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}
    result = {
        "model.embed_tokens.weight": tensors["embedding.weight"][:VOCAB],
        "model.norm.weight": tensors["norm.weight"],
    }
    head = tensors["embedding.weight" if model.output is None else "output.weight"]
    result["lm_head.weight"] = head[:VOCAB]
    for layer in range(spec.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        sizes = [spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim]
        for letter, part in zip("qkv", tensors[f"{ours}attention.qkv.weight"].split(sizes), strict=True):
            result[f"{theirs}self_attn.{letter}_proj.weight"] = part
        gate, up = tensors[f"{ours}feed_forward.gate_up.weight"].chunk(2)
        result |= {f"{theirs}mlp.gate_proj.weight": gate, f"{theirs}mlp.up_proj.weight": up}
        for name, other in names.items():
            if f"{ours}{name}.weight" in tensors:
                result[f"{theirs}{other}.weight"] = tensors[f"{ours}{name}.weight"]
    return result


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 2, "tie_embeddings": False},
        {"num_kv_heads": 1, "tie_embeddings": False, "rope_theta": 500.0},
        {"num_kv_heads": 2, "qk_norm": True},
    ],
    ids=["mha-tied", "gqa-untied", "mqa-untied", "gqa-qk-norm"],
)
def test_logits_and_gradients_equal_transformers(changes: dict[str, Any], backend: AttentionBackend) -> None:
    model = small_model(attention_backend=backend, **changes)
    reference = reference_model(model)
    tokens = some_tokens(2, 24)
    direction = torch.randn(2, 24, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    logits, expected = model(tokens), reference(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    ours = renamed(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)


# -- attention ---------------------------------------------------------------------------------------------------------


def segment_numbers(batch: int, length: int) -> Tensor:
    return torch.stack([torch.arange(length) // (3 + row) for row in range(batch)])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_segments", [True, False])
def test_eager_attention_equals_sdpa(kv_heads: int, causal: bool, with_segments: bool) -> None:
    segments = segment_numbers(3, 24) if with_segments else None
    results: list[list[Tensor]] = []
    for backend in ("sdpa", "eager"):
        model = small_model(num_kv_heads=kv_heads, attention_backend=backend)
        logits = model(some_tokens(3, 24), segments=segments, causal=causal)
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append([logits, *gradients])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-10, atol=1e-10)


def influence(model: Transformer, **arguments: Any) -> Tensor:
    """bool [length, length]: whether an output position depends on an input position, by gradients."""
    length = model.spec.context_length
    embedded: list[Tensor] = []
    handle = model.embedding.register_forward_hook(lambda *call: embedded.append(call[2].requires_grad_()))
    logits = model(some_tokens(1, length), **arguments)
    handle.remove()
    rows = [torch.autograd.grad(logits[0, t].sum(), embedded, retain_graph=True)[0][0] for t in range(length)]
    return torch.stack([row.abs().sum(dim=-1) > 0 for row in rows])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_position_depends_on_exactly_the_positions_it_may_see(backend: AttentionBackend) -> None:
    model = small_model(attention_backend=backend)
    segments = segment_numbers(1, 24)
    triangle = torch.ones(24, 24, dtype=torch.bool).tril()
    same = segments[0][:, None] == segments[0][None, :]
    assert influence(model).equal(triangle)
    assert influence(model, segments=segments).equal(triangle & same)
    assert influence(model, causal=False).all()
    assert influence(model, segments=segments, causal=False).equal(same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("with_segments", [True, False])
def test_a_future_token_does_not_change_a_bit_of_earlier_logits(
    backend: AttentionBackend, with_segments: bool, dtype: torch.dtype
) -> None:
    model = create_model(small_spec(attention_backend=backend, context_length=200), vocab_size=VOCAB).to(dtype)
    segments = torch.arange(200).expand(2, 200) // 150 if with_segments else None
    tokens = some_tokens(2, 200)
    before = model(tokens, segments=segments)
    for changed in (1, 99, 199):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB
        after = model(other, segments=segments)
        assert after[:, :changed].equal(before[:, :changed])
        assert not after[:, changed].equal(before[:, changed])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_document_does_not_change_a_bit_of_another_ones_logits(backend: AttentionBackend, causal: bool) -> None:
    model = create_model(small_spec(attention_backend=backend, context_length=200), vocab_size=VOCAB)
    segments = (torch.arange(200) >= 90).long().expand(2, 200)
    tokens = some_tokens(2, 200)
    other = torch.cat([some_tokens(2, 90, seed=9), tokens[:, 90:]], dim=1)
    before, after = (model(t, segments=segments, causal=causal) for t in (tokens, other))
    assert after[:, 90:].equal(before[:, 90:])
    assert not after[:, :90].equal(before[:, :90])


def test_packed_documents_get_the_logits_that_they_get_alone() -> None:
    model = small_model(num_kv_heads=2, qk_norm=True)
    tokens = some_tokens(1, 24)
    packed = model(tokens, segments=segment_numbers(1, 24))
    alone = torch.cat([model(part) for part in tokens.split(3, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)


# -- cache -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("parts", [[24], [1] * 24, [5, 1, 1, 7, 10], [10, 14]])
@pytest.mark.parametrize("with_segments", [True, False])
def test_a_cache_continues_where_it_stopped(backend: AttentionBackend, parts: list[int], with_segments: bool) -> None:
    model = small_model(num_kv_heads=2, attention_backend=backend)
    tokens = some_tokens(3, 24)
    segments = segment_numbers(3, 24) if with_segments else None
    cache = KeyValueCache(model.spec, batch_size=3, capacity=24, dtype=torch.float64)
    pieces: list[Tensor] = []
    with torch.no_grad():
        for part in tokens.split(parts, dim=1):
            place = slice(cache.length, cache.length + part.shape[1])
            pieces.append(model(part, segments=None if segments is None else segments[:, place], cache=cache))
        whole = model(tokens, segments=segments)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)


def test_only_distances_between_positions_matter() -> None:
    model = small_model()
    tokens = some_tokens(2, 10)
    shifted = model(tokens, positions=torch.stack([torch.arange(3, 13), torch.arange(14, 24)]))
    torch.testing.assert_close(shifted, model(tokens), rtol=1e-10, atol=1e-10)


# -- readout, vocabulary, types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_padded_ids_have_no_logits_and_get_no_gradient(tied: bool) -> None:
    model = small_model(tie_embeddings=tied)
    logits = model(some_tokens(2, 8))
    assert logits.shape == (2, 8, VOCAB)
    assert model.embedding.weight.shape[0] == 128
    logits.logsumexp(dim=-1).sum().backward()
    for table in [model.embedding] if model.output is None else [model.embedding, model.output]:
        assert table.weight.grad is not None and not table.weight.grad[VOCAB:].any()
        assert not table.weight[VOCAB:].any()


@pytest.mark.parametrize("tied", [True, False])
def test_optimizers_take_embedding_and_head_for_tables(tied: bool) -> None:
    """Neither decays, and Muon orthogonalises neither."""
    model = small_model(tie_embeddings=tied)
    matrices, others = ({name for name, _ in part} for part in split_parameters(model))
    assert matrices and all(name.startswith("blocks.") for name in matrices)
    assert {"embedding.weight"} | (set() if tied else {"output.weight"}) <= others
    assert tied or model.state_dict()["output.weight"].shape == (128, 32)


def test_readout_gets_the_hidden_states_and_the_head() -> None:
    model = small_model()
    tokens = some_tokens(2, 8)
    logits = model(tokens)
    torch.testing.assert_close(model(tokens, readout=lambda hidden, head: head(hidden)), logits, rtol=0, atol=0)
    chosen = model(tokens, readout=lambda hidden, head: head(hidden[:, [1, 5]]))
    torch.testing.assert_close(chosen, logits[:, [1, 5]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_have_at_least_32_bits(dtype: torch.dtype) -> None:
    logits = create_model(small_spec(), vocab_size=VOCAB).to(dtype)(some_tokens(1, 4))
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_norms_compute_in_32_bits() -> None:
    norm = RMSNorm(64, eps=1e-5).bfloat16()
    x = (1000.0 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    wide = x.double()
    expected = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).equal(expected.bfloat16())


def test_autocast_keeps_its_result_close() -> None:
    model = create_model(small_spec(num_kv_heads=2, qk_norm=True), vocab_size=VOCAB)
    tokens = some_tokens(2, 24)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, segments=segment_numbers(2, 24))
    torch.testing.assert_close(rough, model(tokens, segments=segment_numbers(2, 24)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("with_segments", [True, False])
def test_compiles_to_one_graph(with_segments: bool) -> None:
    model = small_model(num_kv_heads=2, qk_norm=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    segments = segment_numbers(2, 24) if with_segments else None
    for seed in (0, 1):
        tokens = some_tokens(2, 24, seed=seed)
        torch.testing.assert_close(compiled(tokens, segments=segments), model(tokens, segments=segments))


# -- initialisation and size -------------------------------------------------------------------------------------------


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    small = dict(create_model(small_spec(), vocab_size=VOCAB, seed=5).named_parameters())
    deep = dict(create_model(small_spec(num_layers=3, tie_embeddings=False), vocab_size=90, seed=5).named_parameters())
    other = dict(create_model(small_spec(), vocab_size=VOCAB, seed=6).named_parameters())
    name = "blocks.1.attention.qkv.weight"
    assert small[name].equal(deep[name]) and not small[name].equal(other[name])
    assert small["embedding.weight"][:90].equal(deep["embedding.weight"][:90])
    assert not small[name].equal(small["blocks.0.attention.qkv.weight"])


def test_initial_matrices_have_the_standard_deviation_that_they_should() -> None:
    spec = TransformerSpec(num_layers=2, d_model=256, num_heads=4, context_length=8)
    model = create_model(spec, vocab_size=1000)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            expected = 0.01 if name.endswith(("attention.output.weight", "down.weight")) else 0.02
            values = parameter[:1000]
            assert abs(values.std().item() / expected - 1) < 0.02, name
            assert abs(values.mean().item()) < 5 * expected / values.numel() ** 0.5, name


def test_zero_initialised_outputs_make_each_block_the_identity() -> None:
    model = create_model(small_spec(zero_init_output=True), vocab_size=VOCAB)
    tokens = some_tokens(2, 8)
    torch.testing.assert_close(model(tokens), model.head(model.norm(model.embedding(tokens))))


def test_flops_count_the_matrix_products() -> None:
    """Against PyTorch's own counter, which counts the forward pass of what really runs."""
    from torch.utils.flop_counter import FlopCounterMode

    spec = small_spec(attention_backend="eager", num_kv_heads=2)
    model = create_model(spec, vocab_size=128)
    with FlopCounterMode(display=False) as counter:
        model(some_tokens(1, spec.context_length)).sum().backward()
    assert flops_per_token(spec, 128) * spec.context_length == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 30}, "multiple of num_heads"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"d_model": 36, "num_heads": 4}, "even"),
        ({"rope_scaling_factor": 2.0}, "rope_scaling"),
    ],
)
def test_a_spec_that_cannot_be_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_spec(**changes)
