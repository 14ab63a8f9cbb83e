"""Claims about train.py: attention, model, optimizer, rehearsal, and the script from end to end."""

import gc
import itertools
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA, ENV, GPU, ROOT, USERS_CACHE, summary
from torch.testing import assert_close

import prepare
import train
from train import GPT, GPTConfig, MuonAdamW

compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
COMPILES = pytest.mark.skipif(not shutil.which(compiler), reason="needs a C++ compiler")
USERS_KERNEL = USERS_CACHE / prepare.KERNEL_PATH.name


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test begins with the same random numbers, in float32, and nothing is compiled yet.

    What train.py writes into the environment lasts no longer than the test.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setattr(train, "COMPUTE_DTYPE", torch.float32)
    with mock.patch.dict(os.environ):
        yield


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
    (4, 2, 1, 0),
    (4, 4, 37, 37),
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
    upstream = torch.randn_like(reference)
    ours = [y, *torch.autograd.grad(y, qkv, upstream.to(y.dtype))]
    naive = [reference, *torch.autograd.grad(reference, reference_qkv, upstream)]
    for a, b in zip(ours, naive, strict=True):
        largest = max(1, b.abs().max().item())
        assert_close(a.float(), b, atol=tolerance * largest, rtol=0)


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
            assert_close(attend(*qkv, window), naive_attention(*qkv, window), atol=1e-5, rtol=0)
    # A window of 37 tokens hides nothing, so that graph does without FlexAttention.
    assert ["flex_attention" in graph for graph in graphs] == [True, False]


def test_flex_attention_leaves_what_it_has_no_mask_for_to_sdpa(monkeypatch):
    monkeypatch.setattr(train, "DEVICE", "cpu")
    attend = train.flex_backend({11, 64}, 64)
    for T, window in ((20, 11), (64, 64), (64, 11)):
        assert_same_attention(attend, random_qkv(4, 2, T), window, 1e-5)


@CUDA
@pytest.mark.parametrize("backend", ["flex", "fa3"])
@pytest.mark.parametrize("n_head, n_kv_head, T, window", SHAPES)
def test_a_backend_for_gpus_is_the_same_function(
    monkeypatch, backend, n_head, n_kv_head, T, window
):
    if backend == "flex":
        attend = torch.compile(train.flex_backend({window}, T), dynamic=False)
    elif torch.cuda.get_device_capability()[0] in (8, 9) and USERS_KERNEL.exists():
        monkeypatch.setattr(prepare, "KERNEL_PATH", USERS_KERNEL)
        attend = train.fa3_backend()
    else:
        pytest.skip("this GPU has no FlashAttention-3, or prepare.py has not fetched it")
    qkv = random_qkv(n_head, n_kv_head, T, 64, "cuda", torch.bfloat16)
    assert_same_attention(attend, qkv, window, 0.02)


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
    prepare.fetch_attention_kernel()
    hopper(train.fa3_backend)
    name, attend = train.pick_attention({11, 64}, 64, compiled=False)
    assert name == "fa3"
    assert_same_attention(attend, random_qkv(4, 2, 37), 11, 1e-5)


def no_launch(q, k, v, window):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    "load, reason",
    [
        (train.fa3_backend, "flash-attn3"),  # the library finds no kernel here
        (lambda: no_launch, "no kernel image"),
        (lambda: lambda q, k, v, w: train.sdpa_attention(q, k, v, w - 1), "results differ"),
        (lambda: lambda q, k, v, w: train.sdpa_attention(q * 1.2, k, v, w), "results differ"),
    ],
)
def test_a_missing_or_wrong_kernel_gives_way_with_one_line(hopper, capsys, load, reason):
    hopper(load)
    assert train.pick_attention({11, 64}, 64, compiled=False) == ("sdpa", train.sdpa_attention)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith("attention: fa3 cannot be used here") and reason in out


def test_windows_on_a_gpu_without_fa3_take_flex_attention(monkeypatch):
    monkeypatch.setattr(train, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))  # Blackwell
    monkeypatch.setattr(train, "probe_attention", lambda *args: None)
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
        "bigram_rows": 64,
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
def awake():
    """A model with noise on all parameters, so that every part of it does something."""
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
    for block in model.blocks:
        value_embeds = [torch.randn(1, 48, 32) for _ in block.attn.ve_gates]
        assert torch.equal(block(x, value_embeds, torch.ones(3, 64), model.cos, model.sin), x)


def test_queries_and_keys_are_rotated_and_normed(awake):
    seen = keep_qkv(awake.blocks[0])
    awake(torch.full((1, 48), 5))
    q, k, _ = seen[0]
    for x in (q, k):
        assert torch.allclose(x.square().mean(-1), torch.ones(()), atol=1e-3)
    # All tokens are equal, so a score depends on the distance of two of them, and on that alone.
    # The first token is left out, because there is no previous token for its key.
    scores = (q[0, :, 0] @ k[0, :, 0].T)[1:, 1:]
    assert_close(scores[:-1, :-1], scores[1:, 1:], atol=1e-3, rtol=0)
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


def test_float16_gives_the_gradients_of_float32_because_the_loss_is_scaled(awake, monkeypatch):
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
        return [p.grad / scale for p in model.parameters()]

    exact, half = gradients(torch.float32, 1.0), gradients(torch.float16, 2.0**12)
    for p, q in zip(exact, half, strict=True):
        assert (q - p).norm() < 0.02 * p.norm()


def test_short_windows_bound_what_a_token_sees():
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


def test_a_token_and_a_bigram_have_value_embeddings_of_their_own():
    model = GPT(small_config(bigram_rows=10_007))
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.1)
    torch.nn.init.normal_(model.lm_head.weight)
    assert set(model.value_embeds) == set(model.bigram_embeds) == {"1", "3"}
    idx = torch.randint(96, (1, 48))
    before = model(idx)
    before.sum().backward()
    tokens = idx[0].tolist()
    pairs = list(zip([0, *tokens[:-1]], tokens, strict=True))  # the first token follows none
    bigram_rows = train.hash_bigrams(idx, 10_007)[0]
    for table, rows, keys in (
        (model.value_embeds["3"].weight, idx[0], tokens),
        (model.bigram_embeds["3"].weight, bigram_rows, pairs),  # so large that none collide
    ):
        assert table.grad.any(-1).sum() == len(set(keys))
        with torch.no_grad():
            table[rows[21]] += 1
            assert changed_positions(model(idx), before) == list(range(keys.index(keys[21]), 48))
            table[rows[21]] -= 1


@pytest.mark.parametrize("changes", [{}, {"bigram_rows": 0}, {"conv_taps": 0}, {"conv_taps": 1}])
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
    assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 48, 160), (5, 96, 64), (3, 4, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalize_brings_singular_values_near_one(monkeypatch, shape, dtype):
    monkeypatch.setattr(train, "COMPUTE_DTYPE", dtype)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(5e5, 5e3, min(shape[1:]))  # float16 ends at 65,504
    result = train.orthogonalize(u * values @ vt).float()
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.3
    alignment = F.cosine_similarity(result.flatten(1), (u @ vt).flatten(1))
    assert alignment.min() > 0.98


def reference_muon(weight, gradients, lr, weight_decay, betas):
    """A matrix (m, n) after Muon has taken a step with each of these gradients."""
    (m, n), (beta1, beta2) = weight.shape, betas
    momentum, variance = 0, 0
    for gradient in gradients:
        momentum = beta1 * momentum + (1 - beta1) * gradient
        update = train.orthogonalize((beta1 * momentum + (1 - beta1) * gradient)[None])[0]
        dim = 0 if n > m else 1  # a neuron is a column of a wide matrix, and a row of others
        variance = beta2 * variance + (1 - beta2) * update.square().mean(dim, keepdim=True)
        even = update / variance.sqrt()
        update = even * update.norm() / even.norm()
        decay = torch.where(update * weight > 0, weight_decay * weight, 0)
        weight = weight - lr * math.sqrt(max(1, m / n)) * (update + decay)
    return weight


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_the_muon_half_is_the_published_method_for_each_matrix(shape):
    options = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.9, 0.8)}
    starts, gradients = torch.randn(3, *shape), torch.randn(4, 3, *shape)
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    untrained = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.0}  # AdamW wants one
    optimizer = MuonAdamW([{"kind": "muon", "params": params, **options}, untrained])
    for step in gradients:
        for p, gradient in zip(params, step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    for i, p in enumerate(params):
        expected = reference_muon(starts[i], gradients[:, i], **options)
        # Not each element: where an update is nearly zero, rounding decides whether weights decay.
        assert (p - expected).norm() < 0.01 * (expected - starts[i]).norm()


def test_an_update_does_not_depend_on_the_scale_of_the_gradients():
    models = [GPT(small_config()) for _ in range(2)]
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


def test_memory_that_runs_out_halves_the_device_batch_and_says_so(stage, monkeypatch, capsys):
    model, optimizer, tokenizer = stage
    with pytest.raises(RuntimeError) as of_the_cpu:
        torch.empty(2**60)
    errors = [
        of_the_cpu.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        # What cuBLAS says on a full GPU
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"),
        # What FlashAttention-3 says, because torch's stable interface does not tell it the reason
        RuntimeError("torch_call_dispatcher(op, overload, stack) API call failed at ops.h"),
    ]
    forward, calls = model.forward, itertools.count()

    def limited(idx, targets=None):
        # At the third call the parameters have moved already.
        if errors and next(calls) % 3 == 2:
            raise errors.pop(0)
        return forward(idx, targets)

    monkeypatch.setattr(model, "forward", limited)
    monkeypatch.setattr(train, "DEVICE_BATCH_SIZE", 16)
    before = [p.clone() for p in model.parameters()]
    assert train.fit_batch(model, optimizer, tokenizer) == 1
    halved = [f"out of memory: device batch halved to {B} rows" for B in (8, 4, 2, 1)]
    assert capsys.readouterr().out.splitlines() == halved
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


# Copies of the compiled model, as for an average of weights: without its head, and without the rest
COPIES = """
    import copy
    for has_head in (False, True):
        twin = copy.deepcopy(model)
        for name, p in twin.named_parameters():
            p.detach().mul_(("lm_head" in name) == has_head)
        with torch.no_grad():
            print("copy:", twin(torch.ones(B, MAX_SEQ_LEN, dtype=torch.int64)).abs().max().item())
    print("evaluating")
"""


@COMPILES
def test_a_run_ends_with_the_summary(script, tmp_path):
    save = tmp_path / "model.pt"
    script.edit(r'^    print\("evaluating"\)$', COPIES)
    code, out, err = script.run(
        SEED="7",
        AUTORESEARCH_BUDGET="2",
        AUTORESEARCH_SAVE=str(save),
        HF_ENDPOINT="hf-mirror.example",  # This is no web address, but training needs none.
    )
    assert code == 0, out + err
    assert out.count("copy: 0.0\n") == 2  # each copy answers with its own weights
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
    "scale, shape, width, accum, windows",
    [
        ("full", (1, 2048, 8192), 512, 1, [256, 256, 256, 256, 2048, 256, 256, 256, 2048]),
        ("medium", (1, 1024, 8192), 384, 2, [256, 256, 256, 1024, 256, 1024]),
    ],
)
def test_train_fits_the_scales_for_a_gpu(monkeypatch, scale, shape, width, accum, windows):
    monkeypatch.setattr(prepare, "SCALE", scale)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", shape[1])
    at_scale = runpy.run_path(str(ROOT / "train.py"))  # anew, as after preparing at this scale
    with torch.device("meta"):
        model = at_scale["GPT"](at_scale["GPTConfig"]())
        logits = model(torch.zeros(1, shape[1], dtype=torch.int64))
    assert logits.shape == shape and model.config.n_embd == width
    assert model.config.windows() == windows
    assert at_scale["grad_accum_steps"](at_scale["DEVICE_BATCH_SIZE"]) == accum
