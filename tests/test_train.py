"""Claims about train.py: attention, model, optimizer, rehearsal, and the script from end to end."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import CORPUS, CUDA, ENV, GPU, ROOT, USERS_CACHE

import prepare
import train
from train import GPT, GPTConfig, MuonAdamW

compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
COMPILES = pytest.mark.skipif(not shutil.which(compiler), reason="needs a C++ compiler")
USERS_KERNEL = USERS_CACHE / prepare.KERNEL_PATH.name


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def report(name, a, b):
    """Largest and mean difference of two tensors, printed; the largest is returned."""
    difference = (a.float() - b.float()).abs()
    print(f"{name}: largest difference {difference.max():.2e}, mean {difference.mean():.2e}")
    return difference.max().item()


# ---------------------------------------------------------------------------
# Attention


def naive_attention(q, k, v, window):
    """A plain masked softmax: position i sees i - window to i, which are window + 1 keys."""
    T, group = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.size(-1))
    visible = torch.tensor(
        [[0 <= i - j <= window for j in range(T)] for i in range(T)], device=q.device
    )
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


SHAPES = [
    (n_head, n_kv_head, T, w)
    for n_head, n_kv_head in ((4, 4), (4, 2), (6, 1))
    for T, w in ((1, 0), (37, 37))
]
SHAPES += [
    (4, 2, 37, 0),
    (4, 2, 37, 1),
    (4, 2, 37, 11),
    (4, 4, 130, 64),
    (3, 1, 67, 66),
    (4, 2, 64, 1000),
]
SHAPES += [(4, 2, 300, 140)]


def random_qkv(n_head, n_kv_head, T, head_dim=16, device="cpu", dtype=torch.float32):
    heads = (n_head, n_kv_head, n_kv_head)
    return [
        torch.randn(2, T, n, head_dim, device=device, dtype=dtype, requires_grad=True)
        for n in heads
    ]


def assert_same_attention(attend, qkv, window, tolerance):
    """Forward and backward of `attend` agree with the naive softmax, in the units of its largest value."""
    reference_qkv = [x.detach().float().requires_grad_() for x in qkv]
    y, reference = attend(*qkv, window), naive_attention(*reference_qkv, window)
    assert y.shape == reference.shape
    assert report("output", y, reference) <= tolerance * reference.abs().max().item()
    upstream = torch.randn_like(reference)
    y.backward(upstream.to(y.dtype))
    reference.backward(upstream)
    for name, x, r in zip("qkv", qkv, reference_qkv, strict=True):
        assert report(f"gradient of {name}", x.grad, r.grad) <= tolerance * max(
            1, r.grad.abs().max().item()
        )


@pytest.mark.parametrize("attend", ["sdpa_attention", "blocked_attention"])
@pytest.mark.parametrize("n_head, n_kv_head, T, window", SHAPES)
def test_attention_is_a_masked_softmax_over_window_plus_one_keys(
    attend, n_head, n_kv_head, T, window
):
    assert_same_attention(getattr(train, attend), random_qkv(n_head, n_kv_head, T), window, 1e-5)


def test_flex_attention_is_the_same_function_forward(monkeypatch):
    monkeypatch.setattr(train, "DEVICE", "cpu")
    graphs = []

    def traced(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    attend = torch.compile(train.flex_backend({11, 37}, 37), dynamic=False, backend=traced)
    with torch.no_grad():
        for window in (11, 37):
            qkv = [
                x.detach() for x in random_qkv(4, 2, 37)
            ]  # on a CPU it refuses what wants a gradient
            assert report("output", attend(*qkv, window), naive_attention(*qkv, window)) < 1e-5
    assert ["flex_attention" in graph for graph in graphs] == [True, False]


def test_flex_attention_leaves_what_it_has_no_mask_for_to_sdpa(monkeypatch):
    monkeypatch.setattr(train, "DEVICE", "cpu")
    attend = train.flex_backend({11, 64}, 64)
    for T, window in ((20, 11), (64, 64), (64, 11)):
        assert_same_attention(attend, random_qkv(4, 2, T), window, 1e-5)


@CUDA
@pytest.mark.parametrize("n_head, n_kv_head, T, window", SHAPES)
def test_flex_attention_is_the_same_function_on_cuda(n_head, n_kv_head, T, window):
    attend = torch.compile(train.flex_backend({window}, T), dynamic=False)
    qkv = random_qkv(n_head, n_kv_head, T, 64, "cuda", torch.bfloat16)
    assert_same_attention(attend, qkv, window, 0.02)


@pytest.fixture
def fetched_kernel(monkeypatch):
    """FlashAttention-3 as prepare.py has put it into the user's cache."""
    if torch.cuda.get_device_capability()[0] not in (8, 9):
        pytest.skip("FlashAttention-3 does not support this GPU")
    if not USERS_KERNEL.exists():
        pytest.skip("prepare.py has not fetched FlashAttention-3")
    monkeypatch.setattr(prepare, "KERNEL_PATH", USERS_KERNEL)
    monkeypatch.setenv("LOCAL_KERNELS", "")
    monkeypatch.delenv("LOCAL_KERNELS")  # fa3_backend sets it, and monkeypatch takes it out again


@CUDA
@pytest.mark.parametrize("n_head, n_kv_head, T, window", SHAPES)
def test_fa3_is_the_same_function(fetched_kernel, n_head, n_kv_head, T, window):
    attend = train.fa3_backend()
    assert_same_attention(
        attend, random_qkv(n_head, n_kv_head, T, 64, "cuda", torch.bfloat16), window, 0.02
    )


FAKE_KERNEL = """
import torch
import torch.nn.functional as F

def flash_attn_func(q, k, v, causal, window_size):
    {first}
    T, group = q.size(1), q.size(2) // k.size(2)
    back = torch.arange(T)[:, None] - torch.arange(T)
    mask = (back >= 0) & (back {less} window_size[0])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return y.transpose(1, 2)
"""


@pytest.fixture
def fake_kernel(tmp_path, monkeypatch):
    """Put a kernel of our own where `kernels` looks first, and take the CPU for a CUDA device."""
    import kernels.load

    def install(first="pass", less="<="):
        variant = tmp_path / "kernel" / "build" / "torch-universal"
        variant.mkdir(parents=True)
        (variant / "__init__.py").write_text(FAKE_KERNEL.format(first=first, less=less))
        metadata = {
            "name": "flash-attn3",
            "id": f"fake_{tmp_path.name}",
            "version": 1,
            "license": "MIT",
        }
        metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
        (variant / "metadata.json").write_text(json.dumps(metadata))

    monkeypatch.setenv("LOCAL_KERNELS", f"{prepare.ATTENTION_KERNEL[0]}={tmp_path / 'kernel'}")
    kernels.load._parse_local_kernel_overrides.cache_clear()
    monkeypatch.setattr(train, "DEVICE", "cpu")
    yield install
    kernels.load._parse_local_kernel_overrides.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """Let pick_attention take this machine for a Hopper GPU, and its backends for the CPU that it is."""
    backend = train.fa3_backend

    def on_the_cpu():
        monkeypatch.setattr(train, "DEVICE", "cpu")
        return backend()

    monkeypatch.setattr(train, "fa3_backend", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(train, "DEVICE", "cuda")


def test_a_kernel_from_the_hub_is_loaded_by_name_and_version_and_used(fake_kernel, hopper):
    fake_kernel()
    name, attend = train.pick_attention({11, 64}, 64, compiled=False)
    assert name == "fa3"
    assert_same_attention(attend, random_qkv(4, 2, 37), 11, 1e-5)


def test_training_loads_the_kernel_that_prepare_has_fetched(
    fake_kernel, hopper, monkeypatch, cache, capsys
):
    fake_kernel()
    folder = os.environ["LOCAL_KERNELS"].partition("=")[2]
    monkeypatch.delenv("LOCAL_KERNELS")
    cache.mkdir()
    monkeypatch.setattr(prepare, "KERNEL_PATH", cache / "attention_kernel")
    monkeypatch.setattr(
        "kernels.install_kernel", lambda repo, version: f"{folder}/build/torch-universal"
    )
    prepare.fetch_attention_kernel()
    assert train.pick_attention({64}, 64, compiled=False)[0] == "fa3", capsys.readouterr().out
    monkeypatch.setenv("LOCAL_KERNELS", "")  # for monkeypatch to undo what training has set


def test_a_kernel_that_cannot_be_fetched_is_told_in_one_line(hopper, monkeypatch, cache, capsys):
    def unreachable(repo, version):
        raise ValueError("could not verify the publisher\nand a long story")

    monkeypatch.setattr(prepare, "KERNEL_PATH", cache / "attention_kernel")
    monkeypatch.setattr("kernels.install_kernel", unreachable)
    prepare.fetch_attention_kernel()
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    "fault, reason",
    [
        (None, ""),
        ({"first": "raise RuntimeError('no kernel image is available')"}, "no kernel image"),
        ({"less": "<"}, "results differ"),
        ({"first": "q = q * 1.2"}, "results differ"),
    ],
)
def test_a_missing_or_wrong_kernel_gives_way_with_one_line(
    fake_kernel, hopper, capsys, fault, reason
):
    if fault is not None:
        fake_kernel(**fault)
    assert train.pick_attention({11, 64}, 64, compiled=False) == ("sdpa", train.sdpa_attention)
    out = capsys.readouterr().out
    assert (
        out.count("\n") == 1
        and out.startswith("attention: fa3 cannot be used here")
        and reason in out
    )


def test_windows_on_a_gpu_without_fa3_take_flex_attention(hopper, monkeypatch):
    def no_kernel():
        raise ValueError("there is none")

    monkeypatch.setattr(train, "probe_attention", lambda *args, **options: None)
    monkeypatch.setattr(train, "flex_backend", lambda windows, T: naive_attention)
    monkeypatch.setattr(train, "fa3_backend", no_kernel)
    assert train.pick_attention({11, 64}, 64, compiled=True) == ("flex", naive_attention)
    assert train.pick_attention({11, 64}, 64, compiled=False)[0] == "sdpa"
    assert train.pick_attention({64}, 64, compiled=True)[0] == "sdpa"


def test_a_gpu_of_little_shared_memory_takes_flex_attention_with_two_stages(
    hopper, monkeypatch, capsys
):
    def too_small(attend, *args, **options):
        if attend == "default":
            raise RuntimeError(
                "No valid triton configs. OutOfResources: out of resource: shared memory"
            )

    def flex(windows, T, kernel_options=None):
        return kernel_options or "default"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(train, "probe_attention", too_small)
    monkeypatch.setattr(train, "flex_backend", flex)
    picked = train.pick_attention({11, 64}, 64, compiled=True)
    assert picked == ("flex with two stages", {"num_stages": 2})
    assert "out of resource" in capsys.readouterr().out


def test_a_kernel_that_breaks_the_graph_is_used_and_told_in_one_line(
    fake_kernel, hopper, monkeypatch, capsys
):
    fake_kernel(first="torch._dynamo.graph_break()")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert train.pick_attention({64}, 64, compiled=True)[0] == "fa3"
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "fa3 breaks the compiled graph" in out


def test_a_cpu_takes_blocks_of_queries_once_compiled(monkeypatch):
    monkeypatch.setattr(train, "DEVICE", "cpu")
    assert train.pick_attention({64}, 64, compiled=True) == ("blocked", train.blocked_attention)
    assert train.pick_attention({64}, 64, compiled=False) == ("sdpa", train.sdpa_attention)


SLOPE = 3.0


class Square(torch.autograd.Function):
    """An autograd function of its own, as FlashAttention-3 is one, whose gradient is SLOPE * x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return SLOPE * x * g


@COMPILES
def test_graphs_with_an_autograd_function_are_kept_between_runs_and_never_out_of_date(monkeypatch):
    counters = torch._dynamo.utils.counters["aot_autograd"]
    one, other = random.random(), random.random()  # which no earlier test has compiled
    with torch._functorch.config.patch(autograd_cache_allow_custom_autograd_functions=True):
        for slope, seen in ((one, "miss"), (one, "hit"), (other, "miss")):
            monkeypatch.setattr(sys.modules[__name__], "SLOPE", slope)
            torch._dynamo.reset()
            counters.clear()
            x = torch.randn(8, requires_grad=True)
            torch.compile(lambda x: Square.apply(x).sum(), fullgraph=True)(x).backward()
            assert torch.allclose(x.grad, slope * x.detach())
            assert [name for name in ("miss", "hit") if counters[f"autograd_cache_{name}"]] == [
                seen
            ]


# ---------------------------------------------------------------------------
# Model


def small_config(**changes):
    return GPTConfig(
        **{
            "sequence_len": 48,
            "vocab_size": 96,
            "n_layer": 4,
            "n_head": 4,
            "n_kv_head": 2,
            "n_embd": 64,
        }
        | {"window_pattern": "SSL", "short_window": 7}
        | changes
    )


@pytest.fixture
def awake(monkeypatch):
    """A float32 model none of whose parts is still zero."""
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    model = GPT(small_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_pattern_repeats_and_the_last_layer_sees_all():
    assert small_config(n_layer=7).windows() == [7, 7, 48, 7, 7, 48, 48]
    assert small_config(window_pattern="S").windows() == [7, 7, 7, 48]


def test_forward_gives_capped_logits_or_the_mean_loss(awake):
    with torch.no_grad():
        awake.lm_head.weight.mul_(100)
    idx, targets = torch.randint(96, (2, 3, 48))
    logits = awake(idx)
    assert logits.shape == (3, 48, 96) and 0.9 * train.SOFTCAP < logits.abs().max() <= train.SOFTCAP
    by_hand = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert awake(idx, targets).item() == pytest.approx(by_hand.item())


def test_a_new_model_is_uniform_and_every_block_the_identity():
    model = GPT(small_config())
    idx, targets = torch.randint(96, (2, 3, 48))
    assert model(idx, targets).item() == pytest.approx(math.log(96), abs=0.02)
    x = torch.randn(1, 48, 64)
    cos, sin = model.cos.float(), model.sin.float()
    for block in model.blocks:
        value_embeds = [torch.randn(1, 48, 32) for _ in block.attn.ve_gates]
        assert torch.equal(block(x, value_embeds, torch.ones(3, 64), cos, sin), x)


def test_queries_and_keys_are_rotated_and_normed(awake):
    seen = []
    awake.blocks[0].attn.attend = lambda q, k, v, w: (
        seen.append((q, k)) or train.sdpa_attention(q, k, v, w)
    )
    awake(torch.full((1, 48), 5))
    for x in seen[0]:
        assert torch.allclose(x.square().mean(-1), torch.ones(()), atol=1e-3)
    q, k = (x[0, :, 0] for x in seen[0])
    scores = (q @ k.T)[
        1:, 1:
    ]  # of equal tokens: they depend on distance alone, and do depend on it
    assert report("along diagonals", scores[:-1, :-1], scores[1:, 1:]) < 1e-3
    assert scores[-1].std() > 0.1


def test_half_of_a_key_is_the_previous_tokens(awake):
    seen = []
    awake.blocks[0].attn.attend = lambda q, k, v, w: (
        seen.append(k) or train.sdpa_attention(q, k, v, w)
    )
    idx = torch.randint(96, (1, 48))
    changed = idx.clone()
    changed[0, 10] = (idx[0, 10] + 1) % 96
    for tokens in (idx, changed):
        awake(tokens)
    assert (seen[0] != seen[1]).flatten(2).any(-1)[0].nonzero().flatten().tolist() == [10, 11]


def test_the_mlp_is_relu_squared_of_a_causal_convolution_by_channel(awake):
    block, x, taps = awake.blocks[0], torch.randn(2, 5, 64), torch.randn(3, 64)
    torch.nn.init.zeros_(block.attn.c_proj.weight)
    h = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    kernel = torch.cat([taps.flip(0), torch.ones(1, 64)]).T.unsqueeze(1)  # (64, 1, 4)
    h = F.conv1d(F.pad(h.mT, (3, 0)), kernel, groups=64).mT
    expected = x + (h @ block.mlp.c_fc.weight.T).clamp_min(0) ** 2 @ block.mlp.c_proj.weight.T
    out = block(x, [], taps, awake.cos[:, :5], awake.sin[:, :5])
    assert torch.allclose(out, expected, atol=1e-4)
    alone = block(x[:, :1], [], taps, awake.cos[:, :1], awake.sin[:, :1])  # fewer tokens than taps
    assert torch.allclose(alone, expected[:, :1], atol=1e-4)


def test_every_backend_gives_the_same_model(awake):
    idx, targets = torch.randint(96, (2, 3, 48))
    other = GPT(small_config(), naive_attention)
    other.load_state_dict(awake.state_dict())
    losses = [model(idx, targets) for model in (awake, other)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for (name, p), q in zip(awake.named_parameters(), other.parameters(), strict=True):
        assert report(name, p.grad, q.grad) <= 1e-5 * max(1, q.grad.abs().max().item())


def test_short_windows_bound_what_a_token_sees(monkeypatch):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    model = GPT(small_config(n_layer=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.blocks[1].attn.window = 7  # both layers short
    reach = 2 * (
        7 + 1 + model.config.conv_taps
    )  # the window, the shifted half of a key, the convolution
    idx = torch.randint(96, (1, 48))
    changed = idx.clone()
    changed[0, 10] = (idx[0, 10] + 1) % 96
    differs = (model(idx) != model(changed)).any(-1)[0].nonzero().flatten().tolist()
    assert differs[0] == 10 and differs[-1] == 10 + reach


def test_value_embeddings_reach_the_values_through_their_gate(awake):
    idx = torch.randint(96, (1, 48))
    assert set(awake.value_embeds) == {"1", "3"}
    before = awake(idx)
    with torch.no_grad():
        awake.value_embeds["3"].weight.mul_(3)
    assert not torch.allclose(before, awake(idx))


def test_a_bigram_has_value_embeddings_of_its_own(monkeypatch):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    model = GPT(small_config(bigram_rows=10_007))
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.1)
    torch.nn.init.normal_(model.lm_head.weight)
    table = model.bigram_embeds["3"].weight
    assert set(model.bigram_embeds) == {"1", "3"} and table.shape == (10_007, 32)
    idx = torch.randint(96, (1, 48))
    before = model(idx)
    before.sum().backward()
    rows = table.grad.any(-1).nonzero().flatten().tolist()
    pairs = set(zip([0, *idx[0, :-1].tolist()], idx[0].tolist(), strict=True))
    assert len(rows) == len(pairs)  # no collision in so large a table
    of_20_and_21 = train.hash_bigrams(idx, 10_007)[0, 21]
    with torch.no_grad():
        table[of_20_and_21] += 1
    differs = (model(idx) != before).any(-1)[0].nonzero().flatten().tolist()
    assert differs == list(range(21, 48))


@pytest.mark.parametrize("changes", [{}, {"bigram_rows": 64}, {"conv_taps": 0}, {"conv_taps": 1}])
def test_a_model_is_rebuilt_from_its_saved_configuration(monkeypatch, changes):
    model = GPT(small_config(**changes, softcap=3.0, rope_base=500))
    saved = {"config": asdict(model.config), "model": model.state_dict()}
    for name in ("BIGRAM_ROWS", "CONV_TAPS", "GATE_CHANNELS", "SOFTCAP", "ROPE_BASE", "N_EMBD"):
        monkeypatch.delattr(train, name)  # whatever the constants are by then
    again = GPT(GPTConfig(**saved["config"]))
    again.load_state_dict(saved["model"])
    idx = torch.randint(96, (1, 48))
    assert torch.equal(again(idx), model(idx))


def test_without_a_convolution_there_is_no_parameter_for_it():
    names = [name for name, _ in GPT(small_config(conv_taps=0)).named_parameters()]
    assert not [name for name in names if "conv" in name]


def test_flops_count_products_and_what_attention_sees():
    model = GPT(small_config(n_layer=1))
    matrices = 64 * 64 * 2 + 64 * 32 * 2 + 2 * 64 * 256 + 2 * model.config.gate_channels + 64 * 96
    assert model.flops_per_token() == 6 * matrices + 12 * 64 * 48


# ---------------------------------------------------------------------------
# Optimizer


def test_the_adamw_half_is_torch_adamw_over_many_steps():
    shapes = [(8, 5), (7,), (3, 4, 2)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"kind": "adamw", "params": ours, "lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = MuonAdamW([group], compiled=False)
    reference = torch.optim.AdamW(theirs, lr=0.05, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(200):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn_like(q) * (1 + step % 5)
            p.grad = q.grad.clone()
        for o in (optimizer, reference):
            o.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            o.step()
    for p, q in zip(ours, theirs, strict=True):
        assert report("parameter", p, q) < 1e-5


@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (1, 48, 160), (1, 160, 48), (5, 64, 96), (5, 96, 64), (3, 4, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_brings_singular_values_near_one(monkeypatch, shape, dtype):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", dtype)
    u, values, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = 50 * u * torch.linspace(1, 0.01, values.size(-1)) @ vt
    result = train.orthogonalize(matrices).float()
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    print(f"singular values {values.min():.3f} to {values.max():.3f}")
    assert values.min() > 0.7 and values.max() < 1.3
    alignment = (result * (u @ vt)).sum((-2, -1)) / (
        result.norm(dim=(-2, -1)) * (u @ vt).norm(dim=(-2, -1))
    )
    assert alignment.min() > 0.98


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_a_muon_step_is_orthogonal_with_even_neurons_and_keeps_its_size(monkeypatch, shape):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    group = {"kind": "muon", "params": params, "lr": 1.0, "weight_decay": 0.5}
    optimizer = MuonAdamW([group], compiled=False)
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    gradients = u * torch.linspace(1, 0.1, min(shape)) @ vt
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    m, n = shape
    for p, g in zip(params, gradients, strict=True):
        update = -p.detach() / max(1, m / n) ** 0.5
        assert (update * g).sum() > 0
        assert update.norm().item() == pytest.approx(math.sqrt(min(m, n)), rel=0.1)
        rms = update.square().mean(-1 if m >= n else -2).sqrt()
        assert rms.max() / rms.min() < 1.01
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.6 and values.max() < 1.5


def test_muon_keeps_its_momentum(monkeypatch):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    p = torch.nn.Parameter(torch.zeros(16, 32))
    optimizer = MuonAdamW(
        [{"kind": "muon", "params": [p], "lr": 1.0, "weight_decay": 0.0}], compiled=False
    )
    p.grad = torch.randn_like(p)
    optimizer.step()
    first = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    second = p.detach() - first
    assert F.cosine_similarity(first.flatten(), second.flatten(), dim=0) > 0.99


def test_weight_decay_is_cautious():
    weight = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    decayed = []
    for decay in (0.0, 0.5):
        p = torch.nn.Parameter(weight.clone())
        p.grad = torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
        MuonAdamW(
            [{"kind": "muon", "params": [p], "lr": 0.1, "weight_decay": decay}], compiled=False
        ).step()
        decayed.append(p.detach())
    plain, cautious = decayed
    step = weight - plain
    expected = plain - 0.1 * 0.5 * weight * (step * weight >= 0)
    assert torch.allclose(cautious, expected, atol=1e-6)


@COMPILES
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_the_compiled_optimizer_is_the_eager_one_and_new_rates_do_not_recompile(
    monkeypatch, device
):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    models = [GPT(small_config()).to(device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compiled, eager = (
        MuonAdamW(m.param_groups(), c) for m, c in zip(models, (True, False), strict=True)
    )
    for step in range(5):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in (compiled, eager):
            for group in optimizer.param_groups:
                group.update(
                    lr=0.1 / (step + 1), weight_decay=0.1 * step, betas=(0.8 + 0.02 * step, 0.95)
                )
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            compiled.step()
        eager.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        # Cautious decay asks for a sign, and a number that is zero but for rounding may have either.
        assert ((p - q).abs() > 1e-4).sum() <= 2


def test_the_learning_rate_rises_stays_and_falls(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.1)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.2)
    factors = [train.lr_factor(progress) for progress in (0, 0.05, 0.1, 0.3, 0.5, 0.75, 1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 1, 0.6, 0.2])


def test_without_warmup_and_warmdown_the_learning_rate_is_constant(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0)
    assert [train.lr_factor(progress) for progress in (0, 0.5, 1)] == [1, 1, 1]


def test_the_schedule_ends_where_it_should():
    model = GPT(small_config())
    optimizer = MuonAdamW(model.param_groups(), compiled=False)
    initial = [group["lr"] for group in optimizer.param_groups]
    assert train.schedule(optimizer, 0, 0.0) == 1.0
    assert train.schedule(optimizer, 10**6, 1.0) == pytest.approx(train.FINAL_LR_FRAC)
    muon = [group for group in optimizer.param_groups if group["kind"] == "muon"]
    assert all(group["betas"][0] == train.MOMENTUM and group["weight_decay"] == 0 for group in muon)
    train.schedule(optimizer, 0, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == initial


def test_every_parameter_has_one_group():
    model = GPT(small_config(bigram_rows=64))
    grouped = [id(p) for group in model.param_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))


def test_a_parameter_that_nobody_would_train_is_named():
    model = GPT(small_config())
    model.forgotten = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(AssertionError, match="forgotten is in 0 groups"):
        model.param_groups()


def test_a_vector_in_a_block_goes_to_adamw_and_a_matrix_to_muon():
    model = GPT(small_config())
    model.blocks[0].attn.scale = torch.nn.Parameter(torch.ones(4))
    model.blocks[0].mlp.c_gate = train.Linear(64, 256)
    groups = model.param_groups()
    kinds = {id(p): group.get("kind", "adamw") for group in groups for p in group["params"]}
    assert kinds[id(model.blocks[0].attn.scale)] == "adamw"
    assert kinds[id(model.blocks[0].mlp.c_gate.weight)] == "muon"
    optimizer = MuonAdamW(groups, compiled=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert (model.blocks[0].attn.scale != 1).all()


class SwiGLU(torch.nn.Module):
    """The replacement for the MLP that agents try first."""

    def __init__(self, config):
        super().__init__()
        self.c_gate = train.Linear(config.n_embd, 4 * config.n_embd)
        self.c_fc = train.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = train.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


def test_a_gated_mlp_is_born_alive(monkeypatch):
    monkeypatch.setattr(train, "MLP", SwiGLU)
    model = GPT(small_config())
    optimizer = MuonAdamW(model.param_groups(), compiled=False)
    idx, targets = torch.randint(96, (2, 3, 48))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "mlp" in name}
    for _ in range(3):
        model(idx, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(before) == 12
    for name, parameter in model.named_parameters():
        assert name not in before or not torch.equal(parameter, before[name]), name


# ---------------------------------------------------------------------------
# Rehearsal


@pytest.fixture
def stage(tiny, monkeypatch):
    """An eager small model, its optimizer and tokenizer at the tiny scale."""
    for name, value in {
        "MAX_SEQ_LEN": 32,
        "DEVICE": "cpu",
        "DEVICE_BATCH_SIZE": 8,
        "TOTAL_BATCH_SIZE": 512,
    }.items():
        monkeypatch.setattr(train, name, value)
    tokenizer = prepare.Tokenizer.from_directory()
    model = GPT(small_config(sequence_len=32, vocab_size=tokenizer.get_vocab_size()))
    return model, MuonAdamW(model.param_groups(), compiled=False), tokenizer


def test_a_rehearsal_leaves_no_trace(stage):
    model, optimizer, tokenizer = stage
    before = {
        name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    assert train.fit_batch(model, optimizer, tokenizer) == 8
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters()) and model.training
    for group in optimizer.param_groups:
        moments = [m for value in group["moments"].values() for m in value]
        assert group["step"] == 0 and not any(m.any() for m in moments)
    torch.manual_seed(train.SEED)
    expected = torch.rand(3)
    train.rehearse(model, optimizer, tokenizer, 8)
    assert torch.equal(torch.rand(3), expected)
    assert prepare.clock.start is None


def test_a_model_that_looks_ahead_is_refused_before_the_clock_starts(stage):
    model, optimizer, tokenizer = stage
    model.blocks[2].attn.attend = lambda q, k, v, w: train.sdpa_attention(q.flip(1), k, v, w)
    with pytest.raises(SystemExit, match="depend on later tokens"):
        train.fit_batch(model, optimizer, tokenizer)
    assert prepare.clock.start is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        # cuBLAS on a full card, and FlashAttention-3, to which torch's stable interface gives no message
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        RuntimeError(
            "torch_call_dispatcher(op, overload, stack) API call failed at ops.h, line 123"
        ),
        None,
    ],
)
def test_memory_that_runs_out_halves_the_device_batch_and_says_so(
    stage, monkeypatch, capsys, error
):
    model, optimizer, tokenizer = stage
    forward = model.forward

    calls = itertools.count()

    def limited(idx, targets=None):
        if len(idx) > 2 and next(calls) % 3 == 2:  # in the second step, when parameters have moved
            if error is None:
                torch.empty(2**60)  # the CPU allocator's own error
            raise error
        return forward(idx, targets)

    monkeypatch.setattr(model, "forward", limited)
    before = [p.clone() for p in model.parameters()]
    assert train.fit_batch(model, optimizer, tokenizer) == 2
    assert capsys.readouterr().out.splitlines() == [
        "out of memory: device batch halved to 4 rows",
        "out of memory: device batch halved to 2 rows",
    ]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_every_attempt_to_start_gets_the_full_time(stage, monkeypatch):
    model, optimizer, tokenizer = stage
    forward, events = model.forward, []

    def limited(idx, targets=None):
        events.append(len(idx))
        if len(idx) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(idx, targets)

    monkeypatch.setattr(prepare, "watch", lambda seconds: events.append(f"{seconds} s"))
    monkeypatch.setattr(model, "forward", limited)
    train.fit_batch(model, optimizer, tokenizer)
    assert events[:6] == ["600 s", 8, "600 s", 4, "600 s", 2]


def test_other_errors_are_not_taken_for_a_lack_of_memory(stage, monkeypatch):
    model, optimizer, tokenizer = stage
    monkeypatch.setattr(model, "forward", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        train.fit_batch(model, optimizer, tokenizer)


def test_a_batch_that_does_not_divide_is_one_sentence(stage, monkeypatch):
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 500)
    with pytest.raises(SystemExit, match="TOTAL_BATCH_SIZE 500 is no multiple"):
        train.grad_accum_steps(8)


# ---------------------------------------------------------------------------
# The script from end to end, in a folder of its own, with a model of a moment

SMALL = {"DEPTH": 2, "N_EMBD": 64, "HEAD_DIM": 16, "N_KV_HEAD": 2, "WINDOW_PATTERN": "'SL'"}
SMALL |= {"TOTAL_BATCH_SIZE": "2**12", "DEVICE_BATCH_SIZE": 16}
SUMMARY = [
    "val_bpb",
    "training_seconds",
    "total_seconds",
    "peak_vram_mb",
    "mfu_percent",
    "total_tokens_M",
    "num_steps",
    "num_params_M",
    "depth",
    "startup_seconds",
    "eval_seconds",
    "seed",
    "device",
    "attention",
    "source",
    "epochs",
    "harness",
]


class Script:
    """A copy of train.py with constants and lines changed, run by `start` or `run`."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("prepare.py", "train.py"):
            shutil.copy(ROOT / name, folder)
        for name, value in SMALL.items():
            self.edit(rf"^{name} = [^#\n]*", f"{name} = {value}  ")

    def edit(self, pattern, replacement):
        path = self.folder / "train.py"
        text, count = re.subn(pattern, lambda _: replacement, path.read_text(), flags=re.MULTILINE)
        assert count == 1, f"{pattern} matches {count} times"
        path.write_text(text)

    def start(self, **env):
        env = {**ENV, "AUTORESEARCH_BUDGET": "1", **env}
        command = [sys.executable, "train.py"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=env, **pipes)

    def run(self, **env):
        process = self.start(**env)
        out, err = process.communicate()
        return process.returncode, out, err


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


EAGER = {"TORCH_COMPILE_DISABLE": "1"}  # makes torch.compile do nothing, and the tests below quick


def summary(out):
    lines = out[out.rindex("---\n") :].splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == SUMMARY
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


@COMPILES
def test_a_run_ends_with_the_summary(script, tmp_path):
    save = tmp_path / "model.pt"
    hub = "hf-mirror.example"  # no web address, but training needs none
    code, out, err = script.run(
        SEED="7", AUTORESEARCH_SAVE=str(save), AUTORESEARCH_BUDGET="2", HF_ENDPOINT=hub
    )
    assert code == 0, out + err
    values = summary(out)
    steps = re.findall(r"^step (\d+) +\| +([\d.]+)% \| loss ([\d.]+)", out, re.MULTILINE)
    assert steps and "\r" not in out
    assert float(steps[-1][2]) < float(steps[0][2]) == pytest.approx(math.log(2048), abs=0.1)
    training, n_steps = float(values["training_seconds"]), int(values["num_steps"])
    assert 2 <= training <= 2 + 2 * training / n_steps + 1
    assert float(values["total_tokens_M"]) == pytest.approx(n_steps * 2**12 / 1e6, abs=0.06)
    assert 1 < float(values["val_bpb"]) < 4
    assert float(values["total_seconds"]) > sum(
        float(values[k]) for k in ("startup_seconds", "eval_seconds")
    )
    assert (values["seed"], values["attention"], values["source"]) == ("7", "blocked", "corpus")
    assert values["mfu_percent"] == "n/a" and float(values["peak_vram_mb"]) > 100
    assert re.fullmatch("[0-9a-f]{12}", values["harness"])
    assert "\nsample: " in out and "sample: none" not in out
    saved = torch.load(save)
    assert saved["config"]["n_layer"] == 2 and saved["model"]["wte.weight"].shape == (2048, 64)


@CUDA
@COMPILES
def test_the_whole_program_on_a_gpu(tmp_path):
    if USERS_KERNEL.exists():
        shutil.copy(USERS_KERNEL, tmp_path)
    env = {**ENV, **GPU, "AUTORESEARCH_CACHE": str(tmp_path), "AUTORESEARCH_BUDGET": "20"}
    for command in (["prepare.py", "--source", CORPUS, "--scale", "full"], ["train.py"]):
        result = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
    values = summary(result.stdout)
    assert 1 < float(values["val_bpb"]) < 4
    assert values["attention"] != "sdpa" and "eager" not in result.stdout, result.stdout


@CUDA
@COMPILES
def test_a_batch_that_a_gpu_has_no_memory_for_is_halved_until_it_fits(script):
    memory = torch.cuda.get_device_properties(0).total_memory
    row = 256 * 2048 * 2  # bytes of a row's logits in bfloat16
    rows = 2 ** math.ceil(math.log2(memory / row))  # their logits alone would fill it
    script.edit(r"^DEVICE_BATCH_SIZE = [^#\n]*", f"DEVICE_BATCH_SIZE = {rows}  ")
    script.edit(r"^TOTAL_BATCH_SIZE = [^#\n]*", f"TOTAL_BATCH_SIZE = {rows * 256}  ")
    code, out, err = script.run(**GPU, AUTORESEARCH_BUDGET="20")
    assert code == 0, out + err
    assert f"device batch halved to {rows // 2} rows" in out and float(summary(out)["val_bpb"]) > 1


@pytest.mark.parametrize("device, warnings", [("cuda", 1), ("cpu", 0)])
def test_on_a_gpu_an_eager_run_is_told_loudly(monkeypatch, capsys, device, warnings):
    def no_triton(function):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(train, "DEVICE", device)
    monkeypatch.setattr(torch, "compile", no_triton)
    assert not train.can_compile()
    out = capsys.readouterr().out
    assert "torch.compile cannot be used (Failed to find C compiler)" in out
    assert out.count("WARNING") == out.count("python3-dev") == warnings


def test_without_a_compiler_it_runs_eagerly_and_says_so(script):
    code, out, err = script.run(CXX="/no/such/compiler", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert code == 0, out + err
    assert len([line for line in out.splitlines() if "running eagerly" in line]) == 1
    assert float(summary(out)["val_bpb"]) > 1 and summary(out)["device"].endswith(", eager")


def test_a_loss_that_is_no_number_fails_with_the_reason(script):
    script.edit(r"^    optimizer.step\(\)$", "    optimizer.step(); total = total * float('nan')")
    code, out, err = script.run(**EAGER)
    assert code == 1 and "FAIL: the loss is nan at step" in out and "Traceback" not in err


def test_drawing_batches_long_after_the_budget_is_refused(script):
    script.edit(
        r"^    training_seconds = .*$", "    clock.start -= 10; next(batches); training_seconds = 1"
    )
    code, out, err = script.run(**EAGER)
    assert code == 1 and "into a budget of 1 s" in err and "val_bpb" not in out


def test_before_prepare_it_says_what_to_run(script, tmp_path):
    code, out, err = script.run(AUTORESEARCH_CACHE=str(tmp_path / "empty"))
    assert code == 1 and err.count("\n") == 1 and "uv run prepare.py" in err and not out


def test_another_prepare_py_than_the_one_that_prepared_is_refused(script):
    with (script.folder / "prepare.py").open("a") as file:
        file.write("# edited\n")
    code, out, err = script.run()
    assert code == 1 and err.count("\n") == 1 and "another version of prepare.py" in err


def test_a_folder_for_the_weights_that_is_missing_is_told_at_once(script, tmp_path):
    code, out, err = script.run(AUTORESEARCH_SAVE=str(tmp_path / "no" / "model.pt"))
    assert code == 1 and err.startswith("error: AUTORESEARCH_SAVE=") and not out


def test_weights_that_cannot_be_written_are_told_after_the_score(script, tmp_path):
    (tmp_path / "model.pt.part").mkdir()
    code, out, err = script.run(AUTORESEARCH_SAVE=str(tmp_path / "model.pt"), **EAGER)
    assert code == 1 and float(summary(out)["val_bpb"]) > 1
    assert err.startswith("error: AUTORESEARCH_SAVE=") and err.count("\n") == 1


def test_ctrl_c_ends_training_at_once_with_130(script):
    process = script.start(AUTORESEARCH_BUDGET="60", **EAGER)
    while not process.stdout.readline().startswith("step 0"):
        assert process.poll() is None
    start = time.time()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err and time.time() - start < 5


def test_importing_train_runs_nothing_and_fits_the_full_scale_too(tmp_path):
    (tmp_path / "current").write_text("p\n")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "meta.json").write_text(json.dumps({"scale": "full"}))
    code = """if True:
        import torch, train
        with torch.device("meta"):
            model = train.GPT(train.GPTConfig())
            logits = model(torch.zeros(1, train.MAX_SEQ_LEN, dtype=torch.int64))
        print(*logits.shape, train.grad_accum_steps(train.DEVICE_BATCH_SIZE), model.config.windows())
        print(torch._functorch.config.autograd_cache_allow_custom_autograd_functions)
    """
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.stdout == f"1 2048 8192 2 {[256] * 4 + [2048] + [256] * 3 + [2048]}\nTrue\n", (
        result.stderr
    )
