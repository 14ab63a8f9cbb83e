"""Claims about train.py: attention, model, optimizer, rehearsal, and the script from end to end."""

import gc
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA, ENV, GPU, ROOT, USERS_CACHE, summary

import prepare
import train
from train import GPT, GPTConfig, MuonAdamW

compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
COMPILES = pytest.mark.skipif(not shutil.which(compiler), reason="needs a C++ compiler")
USERS_KERNEL = USERS_CACHE / prepare.KERNEL_PATH.name


@pytest.fixture(autouse=True)
def fresh():
    """Each test begins with the same random numbers, and nothing is compiled yet."""
    torch.manual_seed(0)
    torch._dynamo.reset()


def report(name, a, b):
    """Print the largest and the mean difference of two tensors, and return the largest."""
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
    visible = [[0 <= i - j <= window for j in range(T)] for i in range(T)]
    hidden = ~torch.tensor(visible, device=q.device)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


SHAPES = [  # n_head, n_kv_head, T, window
    (4, 4, 1, 0),
    (4, 4, 37, 37),
    (4, 2, 1, 0),
    (4, 2, 37, 37),
    (6, 1, 1, 0),
    (6, 1, 37, 37),
    (4, 2, 37, 0),
    (4, 2, 37, 1),
    (4, 2, 37, 11),
    (4, 4, 130, 64),
    (3, 1, 67, 66),
    (4, 2, 64, 1000),
    (4, 2, 300, 140),
]


def random_qkv(n_head, n_kv_head, T, head_dim=16, device="cpu", dtype=torch.float32):
    like = {"device": device, "dtype": dtype, "requires_grad": True}
    return [torch.randn(2, T, n, head_dim, **like) for n in (n_head, n_kv_head, n_kv_head)]


def assert_same_attention(attend, qkv, window, tolerance):
    """The output and the gradients of `attend` agree with those of the naive softmax.

    The tolerance is a share of the largest value of the reference.
    """
    reference_qkv = [x.detach().float().requires_grad_() for x in qkv]
    y, reference = attend(*qkv, window), naive_attention(*reference_qkv, window)
    assert y.shape == reference.shape
    assert report("output", y, reference) <= tolerance * reference.abs().max().item()
    upstream = torch.randn_like(reference)
    y.backward(upstream.to(y.dtype))
    reference.backward(upstream)
    for name, x, x_reference in zip("qkv", qkv, reference_qkv, strict=True):
        largest = max(1, x_reference.grad.abs().max().item())
        assert report(f"gradient of {name}", x.grad, x_reference.grad) <= tolerance * largest


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
            # On a CPU FlexAttention refuses tensors that require a gradient.
            qkv = [x.detach() for x in random_qkv(4, 2, 37)]
            assert report("output", attend(*qkv, window), naive_attention(*qkv, window)) < 1e-5
    # A window of 37 tokens hides nothing, so that graph does without FlexAttention.
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
    """The real FlashAttention-3, which prepare.py has put into the user's cache."""
    if torch.cuda.get_device_capability()[0] not in (8, 9):
        pytest.skip("FlashAttention-3 does not support this GPU")
    if not USERS_KERNEL.exists():
        pytest.skip("prepare.py has not fetched FlashAttention-3")
    monkeypatch.setattr(prepare, "KERNEL_PATH", USERS_KERNEL)
    # fa3_backend sets this variable. Because monkeypatch has set it first, it restores it.
    monkeypatch.setenv("LOCAL_KERNELS", "")
    monkeypatch.delenv("LOCAL_KERNELS")


@CUDA
@pytest.mark.parametrize("n_head, n_kv_head, T, window", SHAPES)
def test_fa3_is_the_same_function(fetched_kernel, n_head, n_kv_head, T, window):
    qkv = random_qkv(n_head, n_kv_head, T, 64, "cuda", torch.bfloat16)
    assert_same_attention(train.fa3_backend(), qkv, window, 0.02)


def kernel(fault=None):
    """A stand-in for FlashAttention-3 that runs anywhere, with a fault in it or without one."""

    def attend(q, k, v, window):
        if fault == "launch":
            raise RuntimeError("no kernel image is available")
        if fault == "scale":
            q = q * 1.2
        return train.sdpa_attention(q, k, v, window - (fault == "window"))

    return attend


@pytest.fixture
def hopper(monkeypatch):
    """Let pick_attention believe in a Hopper GPU, until it loads a kernel: hopper(load)."""

    def install(load):
        def load_on_the_cpu():
            monkeypatch.setattr(train, "DEVICE", "cpu")
            return load()

        monkeypatch.setattr(train, "fa3_backend", load_on_the_cpu)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(train, "DEVICE", "cuda")

    return install


def test_training_loads_the_kernel_that_prepare_has_fetched(hopper, monkeypatch, cache):
    repo, folder = prepare.ATTENTION_KERNEL[0], "/the/kernel"

    def flash_attn_func(q, k, v, causal, window_size):
        assert causal and window_size[1] == 0
        return train.sdpa_attention(q, k, v, window_size[0])

    def get_kernel(name, version):
        assert (name, version) == prepare.ATTENTION_KERNEL
        assert os.environ["LOCAL_KERNELS"] == f"{repo}={folder}"
        return SimpleNamespace(flash_attn_func=flash_attn_func)

    cache.mkdir()
    monkeypatch.setattr(prepare, "KERNEL_PATH", cache / "attention_kernel")
    monkeypatch.setattr("kernels.install_kernel", lambda repo, version: folder)
    monkeypatch.setattr("kernels.get_kernel", get_kernel)
    monkeypatch.setenv("LOCAL_KERNELS", "")  # so that monkeypatch restores it
    monkeypatch.delenv("LOCAL_KERNELS")
    prepare.fetch_attention_kernel()
    hopper(train.fa3_backend)
    name, attend = train.pick_attention({11, 64}, 64, compiled=False)
    assert name == "fa3"
    assert_same_attention(attend, random_qkv(4, 2, 37), 11, 1e-5)


@pytest.mark.parametrize(
    "load, reason",
    [
        (train.fa3_backend, "flash-attn3"),  # the library finds no kernel here
        (lambda: kernel("launch"), "no kernel image"),
        (lambda: kernel("window"), "results differ"),
        (lambda: kernel("scale"), "results differ"),
    ],
)
def test_a_missing_or_wrong_kernel_gives_way_with_one_line(hopper, capsys, load, reason):
    hopper(load)
    assert train.pick_attention({11, 64}, 64, compiled=False) == ("sdpa", train.sdpa_attention)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith("attention: fa3 cannot be used here") and reason in out


def test_windows_on_a_gpu_without_fa3_take_flex_attention(hopper, monkeypatch):
    def no_kernel():
        raise ValueError("there is none")

    hopper(no_kernel)
    monkeypatch.setattr(train, "fa3_backend", no_kernel)  # so that the GPU stays
    monkeypatch.setattr(train, "probe_attention", lambda *args, **options: None)
    monkeypatch.setattr(train, "flex_backend", lambda windows, T: naive_attention)
    assert train.pick_attention({11, 64}, 64, compiled=True) == ("flex", naive_attention)
    assert train.pick_attention({11, 64}, 64, compiled=False)[0] == "sdpa"
    assert train.pick_attention({64}, 64, compiled=True)[0] == "sdpa"


# ---------------------------------------------------------------------------
# Model


def small_config(**changes):
    config = {
        "sequence_len": 48,
        "vocab_size": 96,
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 64,
        "window_pattern": "SSL",
        "short_window": 7,
    }
    return GPTConfig(**{**config, **changes})


def keep_qkv(block):
    """Let a block attend as before. Returns the list that will hold the q, k and v of each call."""
    seen = []

    def attend(q, k, v, window):
        seen.append((q, k, v))
        return train.sdpa_attention(q, k, v, window)

    block.attn.attend = attend
    return seen


def changed_positions(a, b):
    """Where a and b (1, T, ...) differ."""
    return (a != b).flatten(2).any(-1)[0].nonzero().flatten().tolist()


@pytest.fixture
def awake(monkeypatch):
    """A model in float32. Noise on all parameters makes every part of it do something."""
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
    assert logits.shape == (3, 48, 96)
    assert 0.9 * train.SOFTCAP < logits.abs().max() <= train.SOFTCAP
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
    seen = keep_qkv(awake.blocks[0])
    awake(torch.full((1, 48), 5))
    q, k, _ = seen[0]
    for x in (q, k):
        assert torch.allclose(x.square().mean(-1), torch.ones(()), atol=1e-3)
    # All tokens are equal, so a score depends on the distance of two of them, and on that alone.
    # The first token is left out, because there is no previous token for its key.
    scores = (q[0, :, 0] @ k[0, :, 0].T)[1:, 1:]
    assert report("along diagonals", scores[:-1, :-1], scores[1:, 1:]) < 1e-3
    assert scores[-1].std() > 0.1


def test_half_of_a_key_is_the_previous_tokens(awake):
    seen = keep_qkv(awake.blocks[0])
    idx = torch.randint(96, (1, 48))
    changed = idx.clone()
    changed[0, 10] = (idx[0, 10] + 1) % 96
    for tokens in (idx, changed):
        awake(tokens)
    keys = [k for _, k, _ in seen]
    assert changed_positions(*keys) == [10, 11]


def test_the_mlp_is_relu_squared_of_a_causal_convolution_by_channel(awake):
    block, x, taps = awake.blocks[0], torch.randn(2, 5, 64), torch.randn(3, 64)
    torch.nn.init.zeros_(block.attn.c_proj.weight)
    h = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    kernel = torch.cat([taps.flip(0), torch.ones(1, 64)]).T.unsqueeze(1)  # (64, 1, 4)
    h = F.conv1d(F.pad(h.mT, (3, 0)), kernel, groups=64).mT
    hidden = (h @ block.mlp.c_fc.weight.T).clamp_min(0) ** 2
    expected = x + hidden @ block.mlp.c_proj.weight.T
    out = block(x, [], taps, awake.cos[:, :5], awake.sin[:, :5])
    assert torch.allclose(out, expected, atol=1e-4)
    alone = block(x[:, :1], [], taps, awake.cos[:, :1], awake.sin[:, :1])  # fewer tokens than taps
    assert torch.allclose(alone, expected[:, :1], atol=1e-4)


@pytest.mark.parametrize("scale, low, high", [(2.0**12, 0, 0.02), (1.0, 0.1, 1)])
def test_float16_gives_the_gradients_of_float32_if_the_loss_is_scaled(
    awake, monkeypatch, scale, low, high
):
    idx, targets = torch.randint(96, (2, 3, 48))
    optimizer = SimpleNamespace(step=lambda: None)

    def gradients(dtype, scale):
        monkeypatch.setattr(train, "COMPUTE_DTYPE", dtype)
        monkeypatch.setattr(train, "LOSS_SCALE", scale)
        model = GPT(small_config())
        model.load_state_dict(awake.state_dict())

        def part_of_a_usual_batch(idx, targets):
            return model(idx, targets) / 256

        part_of_a_usual_batch.zero_grad = lambda: None  # the gradients stay, to be compared
        train.train_step(part_of_a_usual_batch, optimizer, iter([(idx, targets, 1)]), 1)
        return [p.grad for p in model.parameters()]

    pairs = zip(gradients(torch.float32, 1.0), gradients(torch.float16, scale), strict=True)
    errors = [(half / scale - exact).norm() / exact.norm() for exact, half in pairs]
    print(f"errors {min(errors):.4f} to {max(errors):.4f}")
    assert low < max(errors) < high


def test_short_windows_bound_what_a_token_sees(monkeypatch):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    model = GPT(small_config(n_layer=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.blocks[1].attn.window = 7  # like that of the first layer
    # What each of the two layers sees: the window, a token more in a half of each key, and the taps
    reach = 2 * (7 + 1 + model.config.conv_taps)
    idx = torch.randint(96, (1, 48))
    changed = idx.clone()
    changed[0, 10] = (idx[0, 10] + 1) % 96
    differs = changed_positions(model(idx), model(changed))
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
    tokens = idx[0].tolist()
    pairs = set(zip([0, *tokens[:-1]], tokens, strict=True))  # the first token follows none
    assert len(rows) == len(pairs)  # no collision in so large a table
    row_of_20_and_21 = train.hash_bigrams(idx, 10_007)[0, 21]
    with torch.no_grad():
        table[row_of_20_and_21] += 1
    assert changed_positions(model(idx), before) == list(range(21, 48))


@pytest.mark.parametrize("changes", [{}, {"bigram_rows": 64}, {"conv_taps": 0}, {"conv_taps": 1}])
def test_a_model_is_rebuilt_from_its_saved_configuration(monkeypatch, changes):
    model = GPT(small_config(**changes, softcap=3.0, rope_base=500))
    saved = {"config": asdict(model.config), "model": model.state_dict()}
    for name in ("BIGRAM_ROWS", "CONV_TAPS", "GATE_CHANNELS", "SOFTCAP", "ROPE_BASE", "N_EMBD"):
        monkeypatch.delattr(train, name)  # The constants of a later train.py may be others.
    again = GPT(GPTConfig(**saved["config"]))
    again.load_state_dict(saved["model"])
    idx = torch.randint(96, (1, 48))
    assert torch.equal(again(idx), model(idx))


def test_flops_count_products_and_what_attention_sees():
    model = GPT(small_config(n_layer=1))
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64  # c_q, c_k and c_v, c_proj
    gates = 2 * model.config.gate_channels * 2  # for tokens and bigrams, one for each value head
    mlp = 64 * 256 + 256 * 64
    lm_head = 64 * 96
    attended = 64 * 48  # channels of q, by the tokens of the sequence
    weights = attention + gates + mlp + lm_head
    assert model.flops_per_token() == 6 * weights + 12 * attended


# ---------------------------------------------------------------------------
# Optimizer


def test_the_adamw_half_is_torch_adamw_over_many_steps():
    shapes = [(8, 5), (7,), (3, 4, 2)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    group = {"kind": "adamw", "params": ours, "lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = MuonAdamW([group])
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


def muon(*params, lr, weight_decay):
    """An optimizer for matrices of one shape, and for a parameter without a gradient."""
    group = {"kind": "muon", "params": params, "lr": lr, "weight_decay": weight_decay}
    return MuonAdamW([group, {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr}])


@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (1, 48, 160), (1, 160, 48), (5, 64, 96), (5, 96, 64), (3, 4, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalize_brings_singular_values_near_one(monkeypatch, shape, dtype):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", dtype)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(50, 0.5, min(shape[1:]))
    values = 1e4 * values  # float16 ends at 65,504, and a gradient need not.
    matrices = u * values @ vt
    result = train.orthogonalize(matrices).float()
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    print(f"singular values {values.min():.3f} to {values.max():.3f}")
    assert values.min() > 0.7 and values.max() < 1.3
    alignment = F.cosine_similarity(result.flatten(1), (u @ vt).flatten(1))
    assert alignment.min() > 0.98


@pytest.mark.parametrize(
    "shape, factor, over_a_neuron",
    [
        ((64, 64), 1, 1),  # Each row is a neuron.
        ((32, 128), 1, 0),  # Each column is one.
        ((128, 32), 2, 1),  # Four times as tall as wide, so the step is sqrt(4) times as large.
    ],
)
def test_a_muon_step_is_orthogonal_with_even_neurons_and_keeps_its_size(
    monkeypatch, shape, factor, over_a_neuron
):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    params = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    optimizer = muon(*params, lr=1.0, weight_decay=0.5)
    u, _, vt = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    gradients = u * torch.linspace(1, 0.1, min(shape)) @ vt
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    for p, g in zip(params, gradients, strict=True):
        update = -p.detach() / factor
        assert (update * g).sum() > 0
        # An orthogonal matrix has as many singular values as its shorter side, and each is one.
        assert update.norm().item() == pytest.approx(math.sqrt(min(shape)), rel=0.1)
        rms = update.square().mean(over_a_neuron).sqrt()
        assert rms.max() / rms.min() < 1.01
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.6 and values.max() < 1.5


def test_an_update_does_not_depend_on_the_scale_of_the_gradients(monkeypatch):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    models = [GPT(small_config(bigram_rows=64)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [MuonAdamW(model.param_groups()) for model in models]
    before = [p.detach().clone() for p in models[0].parameters()]
    for _ in range(3):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = 0.01 * torch.randn_like(p)
            q.grad = 2**12 * p.grad
        for optimizer in optimizers:
            train.schedule(optimizer, 0, 0.0)
            optimizer.step()
    for p, q, start in zip(*(model.parameters() for model in models), before, strict=True):
        assert (q - p).norm() < 0.01 * (p - start).norm()


def test_muon_keeps_its_momentum(monkeypatch):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    p = torch.nn.Parameter(torch.zeros(16, 32))
    optimizer = muon(p, lr=1.0, weight_decay=0.0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    first = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    second = p.detach() - first
    assert F.cosine_similarity(first.flatten(), second.flatten(), dim=0) > 0.99


def test_weight_decay_is_cautious():
    weight = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    # A multiple of a rotation. The nearest orthogonal matrix has its signs, and so has the update.
    gradient = torch.tensor([[2.0, -1.0], [1.0, 2.0]])
    results = []
    for decay in (0.0, 0.5):
        p = torch.nn.Parameter(weight.clone())
        p.grad = gradient.clone()
        muon(p, lr=0.1, weight_decay=decay).step()
        results.append(p.detach())
    plain, decayed = results
    # 0.1 * 0.5 of each weight that the update brings nearer to zero: all but the last one
    expected = torch.tensor([[0.05, -0.05], [0.05, 0.0]])
    assert torch.allclose(plain - decayed, expected, atol=1e-6)


def test_the_learning_rate_rises_stays_and_falls(monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.1)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", 0.5)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.2)
    factors = [train.lr_factor(progress) for progress in (0, 0.05, 0.1, 0.3, 0.5, 0.75, 1)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 1, 0.6, 0.2])


def test_the_schedule_ends_where_it_should():
    model = GPT(small_config())
    optimizer = MuonAdamW(model.param_groups())
    initial = [group["lr"] for group in optimizer.param_groups]
    assert train.schedule(optimizer, 0, 0.0) == 1.0
    assert train.schedule(optimizer, 10**6, 1.0) == pytest.approx(train.FINAL_LR_FRAC)
    muon = [group for group in optimizer.param_groups if group["kind"] == "muon"]
    assert all(group["betas"][0] == train.MOMENTUM and group["weight_decay"] == 0 for group in muon)
    train.schedule(optimizer, 0, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == initial


def test_a_parameter_that_nobody_would_train_is_named():
    model = GPT(small_config())
    model.forgotten = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(AssertionError, match="forgotten is in 0 groups"):
        model.param_groups()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 16)])
def test_a_vector_in_a_block_goes_to_adamw_and_a_matrix_to_muon(shape):
    model = GPT(small_config())
    model.blocks[0].attn.scale = torch.nn.Parameter(torch.ones(shape))
    model.blocks[0].mlp.c_gate = train.Linear(64, 256)
    groups = model.param_groups()
    kinds = {id(p): group.get("kind", "adamw") for group in groups for p in group["params"]}
    assert kinds[id(model.blocks[0].attn.scale)] == "adamw"
    assert kinds[id(model.blocks[0].mlp.c_gate.weight)] == "muon"
    optimizer = MuonAdamW(groups)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert (model.blocks[0].attn.scale != 1).all()


# ---------------------------------------------------------------------------
# Rehearsal


@pytest.fixture
def stage(tiny, monkeypatch):
    """A small model that is not compiled, its optimizer, and the tokenizer of the tiny dataset."""
    monkeypatch.setattr(train, "MAX_SEQ_LEN", 32)
    monkeypatch.setattr(train, "DEVICE", "cpu")
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 8)
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 512)
    tokenizer = prepare.Tokenizer.from_directory()
    model = GPT(small_config(sequence_len=32, vocab_size=tokenizer.get_vocab_size()))
    return model, MuonAdamW(model.param_groups()), tokenizer


def test_a_rehearsal_leaves_no_trace(stage):
    model, optimizer, tokenizer = stage

    def state():
        return [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]

    before = state()
    assert train.fit_batch(model, optimizer, tokenizer) == 8
    assert all(torch.equal(*pair) for pair in zip(state(), before, strict=True))
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert not optimizer.adamw.state
    assert all(group["momentum"] == group["variance"] == 0 for group in optimizer.muon)
    torch.manual_seed(train.SEED)
    expected = torch.rand(3)
    train.rehearse(model, optimizer, tokenizer, 8)
    assert torch.equal(torch.rand(3), expected)
    assert prepare.run.start is None


def test_a_model_that_looks_ahead_is_refused_before_the_clock_starts(stage):
    model, optimizer, tokenizer = stage
    for block in model.blocks:  # each token attends to the one after it, and not to itself
        block.attn.attend = lambda q, k, v, w: train.sdpa_attention(
            q, k.roll(-1, 1), v.roll(-1, 1), w
        )
    with pytest.raises(prepare.Refusal, match="depends on later tokens"):
        train.fit_batch(model, optimizer, tokenizer)
    assert prepare.run.start is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        # What cuBLAS says on a full GPU
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        # What FlashAttention-3 says, because torch's stable interface does not tell it the reason
        RuntimeError(
            "torch_call_dispatcher(op, overload, stack) API call failed at ops.h, line 123"
        ),
        # None stands for the error of the allocator for the CPU, which the test provokes.
        None,
    ],
)
def test_memory_that_runs_out_halves_the_device_batch_and_says_so(
    stage, monkeypatch, capsys, error
):
    model, optimizer, tokenizer = stage
    forward, calls = model.forward, itertools.count()

    def limited(idx, targets=None):
        # With 8 rows a step has two calls. So at the third one the parameters have moved already.
        if len(idx) > 2 and next(calls) % 3 == 2:
            if error is None:
                torch.empty(2**60)
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


def test_other_errors_are_not_taken_for_a_lack_of_memory(stage, monkeypatch):
    model, optimizer, tokenizer = stage
    monkeypatch.setattr(model, "forward", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        train.fit_batch(model, optimizer, tokenizer)


def test_a_loss_that_is_no_number_fails_with_the_reason(stage, capsys):
    model, optimizer, tokenizer = stage
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    batches = prepare.make_dataloader(tokenizer, 8, 32)
    with pytest.raises(SystemExit) as stopped:
        train.train_loop(model, optimizer, batches, 2)
    gc.enable()  # The loop has switched it off.
    assert stopped.value.code == 1
    assert capsys.readouterr().out == "FAIL: the loss is nan at step 1\n"


@pytest.mark.parametrize("save", ["no/model.pt", "no/", ""])
def test_a_folder_for_the_weights_that_is_missing_is_told_at_once(
    tmp_path, monkeypatch, capsys, save
):
    monkeypatch.setattr(train, "SAVE", f"{tmp_path}/{save}")
    with pytest.raises(prepare.Refusal, match="AUTORESEARCH_SAVE="):
        train.main()
    assert not capsys.readouterr().out


def test_a_batch_that_does_not_divide_is_one_sentence(stage, monkeypatch):
    monkeypatch.setattr(train, "TOTAL_BATCH_SIZE", 500)
    with pytest.raises(prepare.Refusal, match="TOTAL_BATCH_SIZE 500 is no multiple"):
        train.grad_accum_steps(8)


# ---------------------------------------------------------------------------
# The script from end to end, in a folder of its own


@COMPILES
def test_a_run_ends_with_the_summary(script, tmp_path):
    save = tmp_path / "model.pt"
    env = {
        "SEED": "7",
        "AUTORESEARCH_BUDGET": "2",
        "AUTORESEARCH_SAVE": str(save),
        "HF_ENDPOINT": "hf-mirror.example",  # This is no web address, but training needs none.
    }
    code, out, err = script.run(**env)
    assert code == 0, out + err
    values = summary(out)
    steps = re.findall(r"^step (\d+) +\| +([\d.]+)% \| loss ([\d.]+)", out, re.MULTILINE)
    assert steps and "\r" not in out
    assert float(steps[-1][2]) < float(steps[0][2]) == pytest.approx(math.log(2048), abs=0.1)
    training, n_steps = float(values["training_seconds"]), int(values["num_steps"])
    step = training / n_steps
    assert 2 <= training <= 2 + 2 * step + 1
    assert float(values["total_tokens_M"]) == pytest.approx(n_steps * 2**12 / 1e6, abs=0.06)
    assert 1 < float(values["val_bpb"]) < 4
    parts = float(values["startup_seconds"]) + float(values["eval_seconds"])
    assert float(values["total_seconds"]) > parts
    assert (values["seed"], values["attention"], values["source"]) == ("7", "blocked", "corpus")
    assert values["mfu_percent"] == "n/a" and float(values["peak_vram_mb"]) > 100
    assert re.fullmatch("[0-9a-f]{12}", values["harness"])
    assert "\nsample: " in out and "sample: none" not in out
    saved = torch.load(save)
    assert saved["config"]["n_layer"] == 1 and saved["model"]["wte.weight"].shape == (2048, 64)


@CUDA
@COMPILES
def test_the_whole_program_on_a_gpu(tmp_path):
    if USERS_KERNEL.exists():
        shutil.copy(USERS_KERNEL, tmp_path)
    env = {**ENV, **GPU, "AUTORESEARCH_CACHE": str(tmp_path), "AUTORESEARCH_BUDGET": "20"}
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True}
    for command in (["prepare.py", "--source", "python", "--scale", "full"], ["train.py"]):
        result = subprocess.run([sys.executable, *command], **options)
        assert result.returncode == 0, result.stdout + result.stderr
    values = summary(result.stdout)
    assert 0.1 < float(values["val_bpb"]) < 4
    assert values["attention"] != "sdpa" and "eager" not in result.stdout, result.stdout


@CUDA
@COMPILES
def test_a_batch_that_a_gpu_has_no_memory_for_is_halved_until_it_fits(script):
    rows = 2**12
    memory = 256 * 2048 * 2 * rows  # bytes of their logits in bfloat16
    limit = f"torch.cuda.set_per_process_memory_fraction({memory} / torch.cuda.mem_get_info()[1])"
    script.edit(r"^    torch.manual_seed\(SEED\)$", f"    torch.manual_seed(SEED); {limit}")
    script.set_constant("DEVICE_BATCH_SIZE", str(rows))
    script.set_constant("TOTAL_BATCH_SIZE", str(rows * 256))
    code, out, err = script.run(**GPU, AUTORESEARCH_BUDGET="20")
    assert code == 0, out + err
    assert f"device batch halved to {rows // 2} rows" in out and float(summary(out)["val_bpb"]) > 1


def test_without_a_compiler_it_runs_eagerly_and_says_so(script):
    code, out, err = script.run(CXX="/no/such/compiler", TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert code == 0, out + err
    assert out.count("torch.compile cannot be used") == out.count("WARNING") == 1
    assert float(summary(out)["val_bpb"]) > 1 and summary(out)["device"].endswith(", eager")


@pytest.mark.parametrize(
    "scale, shape, windows",
    [
        ("full", "1 2048 8192 1 512", "256 256 256 256 2048 256 256 256 2048"),
        ("medium", "1 1024 8192 2 384", "256 256 256 1024 256 1024"),
    ],
)
def test_importing_train_runs_nothing_and_fits_the_scales_for_a_gpu(
    tmp_path, scale, shape, windows
):
    (tmp_path / "current").write_text("p\n")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "meta.json").write_text(json.dumps({"scale": scale}))
    code = """if True:
        import torch, train
        with torch.device("meta"):
            model = train.GPT(train.GPTConfig())
            logits = model(torch.zeros(1, train.MAX_SEQ_LEN, dtype=torch.int64))
        accum = train.grad_accum_steps(train.DEVICE_BATCH_SIZE)
        print(*logits.shape, accum, model.config.n_embd)
        print(*model.config.windows())
        print(torch._functorch.config.autograd_cache_allow_custom_autograd_functions)
    """
    env = {**ENV, "AUTORESEARCH_CACHE": str(tmp_path), "AUTORESEARCH_BUDGET": "86400"}
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", code], **options)
    assert result.stdout.splitlines() == [shape, windows, "True"], result.stderr
