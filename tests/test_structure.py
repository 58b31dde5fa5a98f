"""Roles, cores, blocks and layers are found by structure; names occur in these tests only."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from ftc.graph.rewriter import Rewriter
from ftc.graph.structure import ROLES, Structure, find_structure
from ftc.graph.structure.weights import through
from ftc.tests.tiny import HEADS, LAYERS, WIDTH, custom, tiny

aten = torch.ops.aten

# model -> role -> globs over parameter names that together are the role, exactly
EXPECTED: dict[str, dict[str, list[str]]] = {
    "bert": {
        "attention": ["*.attention.self.*", "*.attention.output.dense.*"],
        "ffn": ["*.intermediate.dense.*", "encoder.layer.?.output.dense.*"],
        "embedding": ["embeddings.*_embeddings.weight"],
        "norm": ["*LayerNorm*"],
        "head": ["pooler.dense.*"],
        "bias": ["*dense.bias", "*query.bias", "*key.bias", "*value.bias"],
        "conv": [],
    },
    "gpt2": {
        "attention": ["*.attn.*"],
        "ffn": ["*.mlp.*"],
        "embedding": ["lm_head.weight", "*.wpe.weight"],
        "norm": ["*.ln_*"],
        "head": ["lm_head.weight"],
        "bias": ["*.c_*.bias"],
        "conv": [],
    },
    "llama": {
        "attention": ["*.self_attn.*"],
        "ffn": ["*.mlp.*"],
        "embedding": ["lm_head.weight"],
        "norm": ["*norm.weight"],
        "head": ["lm_head.weight"],
        "bias": [],
        "conv": [],
    },
    "cohere": {
        "attention": ["*.self_attn.*"],
        "ffn": ["*.mlp.*"],
        "embedding": ["lm_head.weight"],
        "norm": ["*norm.weight"],
        "head": ["lm_head.weight"],
        "bias": [],
        "conv": [],
    },
    "mixtral": {
        "attention": ["*.self_attn.*"],
        "ffn": ["*.mlp.experts.*"],
        "embedding": ["model.embed_tokens.weight"],
        "norm": ["*norm.weight"],
        "head": ["lm_head.weight"],
        "bias": [],
        "conv": [],
    },
    "t5": {
        "attention": ["*.SelfAttention.[qkvo].weight"],
        "ffn": ["*.DenseReluDense.*"],
        "embedding": ["*embed_tokens.weight", "*.relative_attention_bias.weight"],
        "norm": ["*layer_norm.weight"],
        "head": [],
        "bias": [],
        "conv": [],
    },
    "xlnet": {
        "attention": ["*.rel_attn.[qkvor]", "*.rel_attn.r_[wr]_bias"],
        "ffn": ["*.ff.layer_[12].*"],
        "embedding": ["word_embedding.weight"],
        "norm": ["*.layer_norm.*"],
        "head": [],
        "bias": ["*.ff.layer_[12].bias", "*.rel_attn.r_[wr]_bias"],
        "conv": [],
    },
    "vit": {
        "attention": ["*.attention.*"],
        "ffn": ["*.mlp.*"],
        "embedding": [],
        "norm": ["*layernorm*"],
        "head": ["pooler.dense.*"],
        "bias": ["*_proj.bias", "*.fc?.bias", "*.projection.bias", "pooler.dense.bias"],
        "conv": ["*.projection.*"],
    },
    "mlp": {
        "attention": [],
        "ffn": [],
        "embedding": [],
        "norm": [],
        "head": ["out.*"],
        "bias": ["*.bias"],
        "conv": [],
    },
    "cnn": {
        "attention": [],
        "ffn": [],
        "embedding": [],
        "norm": ["*_norm.*"],
        "head": ["out.*"],
        "bias": ["stem.bias", "out.bias"],
        "conv": ["stem.*", "block.*"],
    },
    "written": {
        "attention": ["[abcdj]"],
        "ffn": ["[efi]"],
        "embedding": [],
        "norm": ["[gh]"],
        "head": [],
        "bias": ["j"],
        "conv": [],
    },
}


@pytest.fixture(params=EXPECTED)
def named(request) -> tuple[str, Structure]:
    return request.param, find_structure(tiny(request.param))


def _matching(globs: list[str], names: frozenset[str]) -> set[str]:
    return {n for n in names if any(fnmatchcase(n, glob) for glob in globs)}


def test_roles(named):
    model, structure = named
    for role, globs in EXPECTED[model].items():
        assert structure.roles[role] == _matching(globs, structure.parameters), role


def test_roles_partition_every_weight_of_a_transformer(named):
    """Nothing but learned positions and lone projections is without a role."""
    _, structure = named
    idle = {name for name in structure.parameters if not structure.of(name)}
    assert idle <= {"embeddings.cls_token", "embeddings.position_embeddings"}
    assert set(structure.roles) == set(ROLES)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_written_out_attention_has_the_roles_of_the_fused_operator(model):
    fused, written = (find_structure(tiny(m)) for m in (model, f"{model}-eager"))
    assert written.roles == fused.roles
    for a, b in zip(fused.cores, written.cores, strict=True):
        assert a.softmax is None and b.softmax is not None
        assert (a.heads, a.kv_heads, a.head_dim) == (b.heads, b.kv_heads, b.head_dim)
        assert b.mask is not None
        assert a.names == b.names


@pytest.mark.parametrize(
    ("model", "heads", "kv_heads", "head_dim"),
    [
        ("bert", HEADS, HEADS, WIDTH // HEADS),
        ("gpt2", HEADS, HEADS, WIDTH // HEADS),
        ("xlnet", HEADS, HEADS, WIDTH // HEADS),
        ("t5", HEADS, HEADS, 8),
        ("llama", 4, 2, WIDTH // 4),
    ],
)
def test_heads_are_read_off_shapes(model, heads, kv_heads, head_dim):
    for core in find_structure(tiny(model)).cores:
        assert (core.heads, core.kv_heads, core.head_dim) == (heads, kv_heads, head_dim)


def test_operands_of_a_core_are_its_own_products():
    structure = find_structure(tiny("llama"))
    for index, core in enumerate(structure.cores):
        sides = (core.q, core.k, core.v, core.out)
        weights = [structure.products[node].weight for (node,) in sides]
        kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
        assert weights == [f"model.layers.{index}.self_attn.{k}.weight" for k in kinds]


def test_a_fused_product_feeds_all_three_operands():
    for core in find_structure(tiny("gpt2")).cores:
        assert core.q == core.k == core.v
        assert len(core.q) == len(core.out) == 1


def test_gate_and_up_are_told_apart():
    structure = find_structure(tiny("llama"))
    assert len(structure.feed_forwards) == LAYERS
    for index, block in enumerate(structure.feed_forwards):
        weights = [structure.products[n].weight for (n,) in (block.gate, block.up, block.down)]
        prefix = f"model.layers.{index}.mlp"
        assert weights == [f"{prefix}.{k}_proj.weight" for k in ("gate", "up", "down")]
        assert block.activation.target is aten.silu.default


def test_a_plain_block_has_no_gate():
    for block in find_structure(tiny("bert")).feed_forwards:
        assert not block.gate
        assert (len(block.up), len(block.down)) == (1, 1)


def test_layers_hold_their_weights_and_no_other():
    structure = find_structure(tiny("llama-12"))
    assert len(structure.layers) == 12
    for index, layer in enumerate(structure.layers):
        assert layer.names == _matching([f"model.layers.{index}.*"], structure.parameters)


@pytest.mark.parametrize("model", ["bert", "gpt2", "t5", "xlnet", "vit"])
def test_every_layer_is_one_attention_and_one_feed_forward(model):
    layers = find_structure(tiny(model)).layers
    assert [(len(x.cores), len(x.feed_forwards)) for x in layers] == [(1, 1)] * LAYERS
    assert layers[0].names.isdisjoint(layers[1].names)


def test_layers_that_share_weights_are_still_layers():
    layers = find_structure(tiny("albert")).layers
    assert len(layers) == LAYERS
    assert layers[0].names == layers[1].names
    assert len(layers[0].names) == 16


def test_layers_without_scopes_follow_the_order_of_blocks():
    program = tiny("llama")
    scoped = find_structure(program).layers
    for node in program.graph.nodes:
        node.meta.pop("provenance", None)
    assert [x.names for x in find_structure(program).layers] == [x.names for x in scoped]


def test_norms_written_out_are_found_with_what_they_normalize():
    (norm,) = find_structure(tiny("written")).norms
    assert (norm.kind, norm.weight, norm.bias, norm.eps) == ("layer", "g", "h", 1e-5)
    assert norm.x.op == "placeholder"
    assert {n.kind for n in find_structure(tiny("llama")).norms} == {"rms"}


def test_factored_products_keep_the_roles_of_the_whole():
    """``W x`` as ``B A x``: both factors play the part that ``W`` played."""
    program = tiny("llama")
    before = find_structure(program)
    rw = Rewriter(program, "test")
    for node, product in list(before.products.items()):
        tensor = program.tensor(product.weight)
        rw.remove_tensor(product.weight)
        with rw.at(node):
            a = rw.add_parameter(f"{product.weight}.a", torch.randn(4, tensor.shape[1]))
            b = rw.add_parameter(f"{product.weight}.b", torch.randn(tensor.shape[0], 4))
            inner = rw.call(aten.linear.default, node.args[0], a)
            rw.replace(node, rw.call(aten.linear.default, inner, b))
    rw.finish()
    after = find_structure(program)
    for role in ("attention", "ffn", "head", "product"):
        originals = {name.removesuffix(".a").removesuffix(".b") for name in after.roles[role]}
        assert originals == before.roles[role], role
    shape = [(c.heads, c.kv_heads, c.head_dim) for c in before.cores]
    assert [(c.heads, c.kv_heads, c.head_dim) for c in after.cores] == shape


def test_an_adapter_beside_a_product_joins_its_block():
    program = tiny("bert")
    before = find_structure(program)
    rw = Rewriter(program, "test")
    down = before.feed_forwards[0].down[0]
    with rw.after(down):
        a = rw.add_parameter("a", torch.randn(2, program.tensor(str(down.args[1].target)).shape[1]))
        b = rw.add_parameter("b", torch.randn(WIDTH, 2))
        inner = rw.call(aten.linear.default, down.args[0], a)
        rw.replace(down, rw.call(aten.add.Tensor, down, rw.call(aten.linear.default, inner, b)))
    rw.finish()
    after = find_structure(program)
    assert after.roles["ffn"] == before.roles["ffn"] | {"a", "b"}
    assert len(after.feed_forwards[0].down) == 2


def test_quantized_weights_go_by_their_logical_names():
    from ftc.graph import quantized_ops  # noqa: F401  (registers the operators)
    from ftc.graph.quantize import Scheme, choose_qparams, quantize

    program = tiny("bert")
    before = find_structure(program)
    rw, scheme = Rewriter(program, "test"), Scheme()
    for node, product in before.products.items():
        weight = program.tensor(product.weight).detach()
        scale, zero = choose_qparams(weight, scheme)
        rw.remove_tensor(product.weight)
        with rw.at(node):
            data = rw.add_buffer(
                f"{product.weight}.quantized", quantize(weight, scale, zero, scheme)
            )
            steps = rw.add_buffer(f"{product.weight}.scale", scale)
            x, _, bias = node.args
            args = (x, data, steps, None, bias, 8, 0, "row")
            rw.replace(node, rw.call(torch.ops.ftc.quantized_linear.default, *args))
    rw.finish()
    after = find_structure(program)
    assert after.roles == before.roles
    assert after.parameters == before.parameters


def test_a_router_is_no_attention():
    """A softmax over a product's own result weighs experts; no values meet."""

    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.out = torch.nn.Linear(8, 4), torch.nn.Linear(8, 8)

        def forward(self, x):
            return torch.softmax(self.gate(x), -1).sum(-1, keepdim=True) * self.out(x)

    structure = find_structure(custom(Router(), x=torch.randn(3, 8)))
    assert not structure.cores
    assert not structure.roles["attention"]


def test_cores_agree_with_the_graph():
    for core in find_structure(tiny("bert-eager")).cores:
        assert through(core.node.args[0]) is core.softmax


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_finding_changes_nothing(model):
    from ftc.graph.printer import print_graph

    program = tiny(model)
    text = print_graph(program)
    find_structure(program)
    assert print_graph(program) == text
