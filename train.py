"""
A small GPT and its optimizer, trained for five minutes on one device. OPEN: this is the file to improve.

    uv run train.py             # the constants below are the interface: edit them, or anything else in here
    SEED=2 uv run train.py      # the same run once more, with other weights and another order of the data

Data, clock and metric come from prepare.py, which is locked.
"""

import os
import signal
import time

STARTED = time.time()
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import gc
import itertools
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # prepare.py has fetched all there is to fetch
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # fewer tests of the compiler in every run

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from prepare import (
    ATTENTION_KERNEL,
    DEVICE,
    KERNEL_PATH,
    MAX_SEQ_LEN,
    SCALE,
    Tokenizer,
    check_model,
    clock,
    evaluate_bpb,
    first_line,
    from_environment,
    harness_digest,
    make_dataloader,
    prepared,
    stop,
)

# ---------------------------------------------------------------------------
# Hyperparameters, each for the two scales of prepare.py


def by_scale(full, small):
    """The first value at scale `full`, the second at `small`."""
    return full if SCALE == "full" else small


# model
DEPTH = by_scale(9, 4)
N_EMBD = by_scale(512, 256)
HEAD_DIM = 128
N_KV_HEAD = N_EMBD // HEAD_DIM  # fewer than the N_EMBD / HEAD_DIM query heads: grouped-query attention
WINDOW_PATTERN = by_scale("SSSSL", "L")  # repeated over the layers: S sees SHORT_WINDOW tokens back, L all
SHORT_WINDOW = by_scale(256, 64)
ROPE_BASE = by_scale(200_000, 10_000)
SOFTCAP = 15.0  # logits stay within +-SOFTCAP
GATE_CHANNELS = 32  # of the input, that decide how much of a value embedding comes in
INIT_SCALE = by_scale(0.68, 1.0)  # of Q, K, V, the MLP's first matrix and the value embeddings
X0_INIT = by_scale(0.05, 0.1)  # share of the embedding that every layer gets back at first

# batch
TOTAL_BATCH_SIZE = by_scale(2**18, 2**14)  # tokens per optimizer step
DEVICE_BATCH_SIZE = by_scale(64, 32)  # rows per forward pass; halves itself when memory runs out

# optimizer; Adam's rates are for a width of 768 and grow as (N_EMBD / 768) ** -0.5
EMBEDDING_LR = by_scale(0.9, 0.6)
UNEMBEDDING_LR = by_scale(0.005, 0.004)
MATRIX_LR = 0.04
SCALAR_LR = 0.5
ADAM_BETAS = (0.8, 0.95)
WEIGHT_DECAY = 0.2  # of Muon's matrices, down to zero over the run
HEAD_WEIGHT_DECAY = by_scale(0.01, 0.0)
EMBEDDING_WEIGHT_DECAY = by_scale(0.001, 0.0)
VALUE_EMBEDDING_WEIGHT_DECAY = by_scale(0.003, 0.0)
MOMENTUM, MOMENTUM_START, MOMENTUM_STEPS = 0.95, 0.85, 200  # of Muon: from START over STEPS steps

# schedule, in shares of the time budget
WARMUP_RATIO = 0.0
WARMDOWN_RATIO = by_scale(0.75, 0.5)
FINAL_LR_FRAC = by_scale(0.05, 0.0)

SEED = from_environment("SEED", 1, int, 0, 2**31)
SAVE = os.environ.get("AUTORESEARCH_SAVE")  # a file for weights and configuration
LOG_EVERY = 0.02  # of the budget
CHECK_EVERY = 10  # steps between two looks at the loss
SAMPLE_TOKENS = 64

CPU = torch.cpu.get_capabilities() if DEVICE == "cpu" else {}
if DEVICE == "cuda":
    FAST_BF16 = torch.cuda.is_bf16_supported(including_emulation=False)
elif DEVICE == "mps":
    FAST_BF16 = torch.backends.mps.is_macos_or_newer(14, 0)
else:
    FAST_BF16 = any(CPU.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
COMPUTE_DTYPE = torch.bfloat16 if FAST_BF16 else torch.float32  # of activations; parameters are float32

# ---------------------------------------------------------------------------
# Attention: three backends, one function
#
# attend(q, k, v, window) takes q (B, T, n_head, head_dim), k and v (B, T, n_kv_head, head_dim) and gives
# (B, T, n_head, head_dim). A token sees itself and `window` tokens before it, as in FlashAttention-3.

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, on any device."""
    T = q.size(1)
    mask = None
    if window < T - 1:
        back = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
        mask = (back >= 0) & (back <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def flex_backend(windows: set[int], T: int) -> Attend:
    """FlexAttention, which skips what the window hides. Fast when compiled only; masks are built once."""

    def block_mask(window: int):
        def visible(b, h, q, k):
            return (q >= k) & (q - k <= window)

        return create_block_mask(visible, None, None, T, T, device=DEVICE)

    masks = {window: block_mask(window) for window in windows if window < T - 1}

    def attend(q, k, v, window):
        if window not in masks or q.size(1) != T or not torch.compiler.is_compiling():
            return sdpa_attention(q, k, v, window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.size(1) != k.size(1)
        return flex_attention(q, k, v, block_mask=masks[window], enable_gqa=grouped).transpose(1, 2)

    return attend


def fa3_backend() -> Attend:
    """FlashAttention-3, as prepare.py has fetched it."""
    from kernels import get_kernel

    repo, version = ATTENTION_KERNEL
    if KERNEL_PATH.exists():  # the path that prepare.py has noted
        os.environ.setdefault("LOCAL_KERNELS", f"{repo}={KERNEL_PATH.read_text()}")
    flash = get_kernel(repo, version=version)
    flash = getattr(flash, "flash_attn_interface", flash)

    def attend(q, k, v, window):
        return flash.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    return attend


def probe_attention(name: str, attend: Attend, windows: set[int], T: int, compiled: bool) -> None:
    """Raise whatever goes wrong in a forward and a backward pass, wrong results included."""
    if compiled:  # a graph break would hide that FlexAttention fails
        attend = torch.compile(attend, dynamic=False, fullgraph=name == "flex")
    for window in windows:
        heads = (N_EMBD // HEAD_DIM, N_KV_HEAD, N_KV_HEAD)
        qkv = [torch.randn(1, T, n, HEAD_DIM, device=DEVICE, dtype=COMPUTE_DTYPE) for n in heads]
        results = []
        for function in (attend, sdpa_attention):
            leaves = [x.clone().requires_grad_() for x in qkv]
            y = function(*leaves, window)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for ours, theirs in zip(*results, strict=True):
            if not (ours - theirs).float().norm() < 0.02 * theirs.float().norm():
                raise RuntimeError("its results differ from scaled_dot_product_attention")


def pick_attention(windows: set[int], T: int, compiled: bool) -> tuple[str, Attend]:
    """The fastest backend that works here, and its name; on CUDA it says in a line why another does not."""
    backends = {}
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] in (8, 9):
        backends["fa3"] = fa3_backend
    if DEVICE == "cuda" and compiled and min(windows) < T - 1:
        backends["flex"] = lambda: flex_backend(windows, T)
    for name, backend in backends.items():
        try:
            attend = backend()
            probe_attention(name, attend, windows, T, compiled)
            return name, attend
        except Exception as error:  # a missing kernel, a wrong build, a failed launch: the cure is the same
            print(f"attention: {name} cannot be used here ({first_line(error)})", flush=True)
    return "sdpa", sdpa_attention


# ---------------------------------------------------------------------------
# Model


@dataclass
class GPTConfig:
    sequence_len: int = MAX_SEQ_LEN
    vocab_size: int = 8192
    n_layer: int = DEPTH
    n_head: int = N_EMBD // HEAD_DIM
    n_kv_head: int = N_KV_HEAD
    n_embd: int = N_EMBD
    window_pattern: str = WINDOW_PATTERN
    short_window: int = SHORT_WINDOW

    def windows(self) -> list[int]:
        """Tokens that each layer sees before the current one; the last layer always sees all."""
        spans = {"S": self.short_window, "L": self.sequence_len}
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)]
        return [spans[letter] for letter in pattern] + [self.sequence_len]

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, the last one included."""
        return (self.n_layer - 1 - layer) % 2 == 0


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Without bias; the float32 weight is cast to the dtype of the activations."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE (arXiv 2104.09864) on x (B, T, n_head, head_dim); cos and sin are (1, T, 1, head_dim / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (2305.13245) with QK-norm (2010.04245) and value residuals (2410.17897)."""

    def __init__(self, config: GPTConfig, layer: int, attend: Attend):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.window, self.attend = config.windows()[layer], attend
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd)
        self.ve_gate = Linear(GATE_CHANNELS, self.n_kv_head) if config.has_value_embedding(layer) else None

    def forward(self, x, ve, cos, sin):
        B, T, C = x.size()
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, n_kv_head), 1 at first
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))
        y = self.attend(q, k, v, self.window)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """ReLU^2 with four times the width inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attend: Attend):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, attend)
        self.mlp = MLP(config)

    def forward(self, x, ve, cos, sin):
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """model(idx) gives logits (B, T, vocab_size) of idx (B, T); model(idx, targets) gives the mean loss."""

    def __init__(self, config: GPTConfig, attend: Attend = sdpa_attention):
        super().__init__()
        self.config = config
        kv_dim = config.n_embd // config.n_head * config.n_kv_head
        layers = range(config.n_layer)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, i, attend) for i in layers])
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(config.vocab_size, kv_dim) for i in layers if config.has_value_embedding(i)}
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), X0_INIT))
        half = config.n_embd // config.n_head // 2
        frequency = ROPE_BASE ** -(torch.arange(half) / half)
        angle = torch.outer(torch.arange(config.sequence_len), frequency)[None, :, None, :]
        self.register_buffer("cos", angle.cos().to(COMPUTE_DTYPE), persistent=False)
        self.register_buffer("sin", angle.sin().to(COMPUTE_DTYPE), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Output projections and gates start at zero, so every block starts as the identity."""
        bound = INIT_SCALE * math.sqrt(3 / self.config.n_embd)  # a standard deviation of n_embd ** -0.5
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            for linear in (block.attn.c_proj, block.mlp.c_proj, block.attn.ve_gate):
                if linear is not None:
                    nn.init.zeros_(linear.weight)
        for embedding in self.value_embeds.values():
            nn.init.uniform_(embedding.weight, -bound, bound)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        cos, sin = self.cos[:, : idx.size(1)], self.sin[:, : idx.size(1)]
        x = x0 = norm(self.wte(idx).to(COMPUTE_DTYPE))  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin)
        logits = self.lm_head(norm(x)).float()  # (B, T, vocab_size)
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def param_groups(self) -> list[dict]:
        """Groups for MuonAdamW: the blocks' matrices by shape, and all else for AdamW."""
        scale = (self.config.n_embd / 768) ** -0.5

        def adamw(params, lr, weight_decay=0.0, betas=ADAM_BETAS):
            return {"kind": "adamw", "params": params, "lr": lr, "weight_decay": weight_decay, "betas": betas}

        shapes = {}
        for matrix in self.blocks.parameters():
            shapes.setdefault(matrix.shape, []).append(matrix)
        return [
            adamw([self.lm_head.weight], UNEMBEDDING_LR * scale, HEAD_WEIGHT_DECAY),
            adamw([self.wte.weight], EMBEDDING_LR * scale, EMBEDDING_WEIGHT_DECAY),
            adamw(list(self.value_embeds.parameters()), EMBEDDING_LR * scale, VALUE_EMBEDDING_WEIGHT_DECAY),
            adamw([self.resid_lambdas], SCALAR_LR * 0.01),
            adamw([self.x0_lambdas], SCALAR_LR, betas=(0.96, 0.95)),
            *(
                {"kind": "muon", "params": params, "lr": MATRIX_LR, "weight_decay": WEIGHT_DECAY}
                for params in shapes.values()
            ),
        ]

    def flops_per_token(self) -> float:
        """Forward and backward: 6 per weight of a matrix product, 12 per channel and token attended to."""
        weights = self.lm_head.weight.numel() + sum(p.numel() for p in self.blocks.parameters())
        seen = sum(min(window + 1, self.config.sequence_len) for window in self.config.windows())
        return 6 * weights + 12 * self.config.n_embd * seen


# ---------------------------------------------------------------------------
# Optimizer

# Polar Express (arXiv 2505.16932): the best five odd quintic steps towards the nearest orthogonal matrix
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (K, m, n) with their singular values brought to about one: U S V^T becomes U V^T."""
    x = matrices.to(COMPUTE_DTYPE)
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)  # no singular value above one
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def adamw_update(params, grads, firsts, seconds, lr, weight_decay, bias1, bias2, beta1, beta2, eps) -> None:
    """AdamW (arXiv 1711.05101) in place; `bias1` and `bias2` are 1 - beta ** step."""
    for p, g, first, second in zip(params, grads, firsts, seconds, strict=True):
        first.lerp_(g, 1 - beta1)
        second.lerp_(g.square(), 1 - beta2)
        p.mul_(1 - lr * weight_decay)
        p.sub_(lr * (first / bias1) / ((second / bias2).sqrt() + eps))


def muon_update(params, grads, velocity, second, lr, weight_decay, momentum, beta2) -> None:
    """Muon (arXiv 2502.16982) in place, with NorMuon (2510.05491) and cautious decay (2510.12402).

    K matrices (m, n) of one shape, with velocity (K, m, n) and second (K, m, 1) or (K, 1, n).
    """
    g = torch.stack(grads)
    velocity.mul_(momentum).add_(g * (1 - momentum))
    g = orthogonalize(g * (1 - momentum) + velocity * momentum).float()  # Nesterov
    # even out the neurons' step sizes by their running mean square; keep each matrix's norm
    square = g.square().mean(-1 if second.size(-1) == 1 else -2, keepdim=True)
    second.lerp_(square, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    before, after = (x.sum((-2, -1), keepdim=True) for x in (square, square * scale.square()))
    g = g * scale * (before / after.clamp_min(1e-10)).sqrt()
    lr = lr * max(1, g.size(-2) / g.size(-1)) ** 0.5
    for p, u in zip(params, g.unbind(), strict=True):
        p.sub_(lr * (u + weight_decay * p * (u * p >= 0)))  # decay only where the step shrinks the weight too


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon" hold matrices of one shape; groups of kind "adamw" hold anything.

    One compiled graph does all groups. lr, weight_decay and momentum may change at every step: they reach it
    as 0-D tensors.
    """

    def __init__(self, groups: list[dict], compiled: bool = True):
        super().__init__(groups, {"betas": ADAM_BETAS, "eps": 1e-10, "momentum": MOMENTUM, "beta2": 0.95})
        compiler = torch.compile(dynamic=False, fullgraph=True) if compiled else lambda function: function
        self.update = compiler(self.update_all)
        self.scalars = [{} for _ in self.param_groups]

    @staticmethod
    def update_all(jobs: list[tuple]) -> None:
        for kind, tensors, scalars, constants in jobs:
            (muon_update if kind == "muon" else adamw_update)(*tensors, **scalars, **constants)

    def job(self, group: dict, scalars: dict[str, torch.Tensor]) -> tuple:
        """What update_all needs to know of one group; makes its state when it is missing."""
        params = group["params"]
        state = self.state[params[0]]
        if group["kind"] == "muon":
            if not state:
                m, n = params[0].shape
                state["velocity"] = torch.zeros_like(torch.stack(params))
                state["second"] = params[0].new_zeros((len(params), m, 1) if m >= n else (len(params), 1, n))
            values = {"momentum": group["momentum"]}
            constants = {"beta2": group["beta2"]}
            moments = (state["velocity"], state["second"])
        else:
            if not state:
                state["step"] = 0
                state["first"], state["second"] = ([torch.zeros_like(p) for p in params] for _ in range(2))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            values = {"bias1": 1 - beta1 ** state["step"], "bias2": 1 - beta2 ** state["step"]}
            constants = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
            moments = (state["first"], state["second"])
        for name, value in {"lr": group["lr"], "weight_decay": group["weight_decay"], **values}.items():
            scalars.setdefault(name, torch.zeros(())).fill_(value)
        return group["kind"], (params, [p.grad for p in params], *moments), scalars, constants

    @torch.no_grad()
    def step(self) -> None:
        self.update([self.job(*pair) for pair in zip(self.param_groups, self.scalars, strict=True)])


def schedule(optimizer: MuonAdamW, step: int, progress: float) -> float:
    """Set rates, decay and momentum for a step. Returns the factor on the learning rates."""
    factor = min(1.0, progress / WARMUP_RATIO if WARMUP_RATIO else 1.0)
    factor *= min(1.0, FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * (1 - progress) / WARMDOWN_RATIO)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        if group["kind"] == "muon":
            group["momentum"] = MOMENTUM_START + (MOMENTUM - MOMENTUM_START) * min(1, step / MOMENTUM_STEPS)
            group["weight_decay"] = WEIGHT_DECAY * (1 - progress)
    return factor


# ---------------------------------------------------------------------------
# Training

# dense bf16 FLOP/s by part of the GPU's name, from NVIDIA's data sheets
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "GB200": 2500e12}
PEAK_FLOPS |= {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
PEAK_FLOPS |= {"L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "RTX 5090": 209e12}


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{CPU.get('cpu_name') or platform.machine()} {DEVICE}, {torch.get_num_threads()} threads"


def synchronize() -> None:
    if DEVICE != "cpu":
        getattr(torch, DEVICE).synchronize()


def peak_memory_mb() -> float:
    """Peak of the GPU's memory; without CUDA, of the process's."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def can_compile() -> bool:
    """Whether torch.compile works here; says in one line why not."""
    try:
        if DEVICE == "mps":
            raise RuntimeError("it is not reliable on Apple's MPS")
        torch.compile(lambda x: x + 1)(torch.ones(8, device=DEVICE))
        return True
    except Exception as error:  # no C++ compiler, no Triton, no Python headers: each has a class of its own
        print(f"torch.compile cannot be used ({first_line(error)}); running eagerly", flush=True)
        return False


def train_step(
    model: nn.Module, optimizer: MuonAdamW, batches: Iterator, accum: int
) -> tuple[torch.Tensor, int]:
    """One optimizer step over `accum` batches. Returns the mean loss, on the device, and the epoch."""
    total = 0.0
    for _ in range(accum):
        inputs, targets, epoch = next(batches)
        loss = model(inputs, targets) / accum
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, epoch


def grad_accum_steps(B: int) -> int:
    """Batches of B rows in one optimizer step."""
    steps, rest = divmod(TOTAL_BATCH_SIZE, B * MAX_SEQ_LEN)
    if rest or not steps:
        stop(f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is no multiple of {B} rows of {MAX_SEQ_LEN}; change one")
    return steps


def rehearse(model: nn.Module, optimizer: MuonAdamW, tokenizer: Tokenizer, B: int) -> None:
    """Compile, meet the peak of memory and check the model, before the clock; then put everything back."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    tokens = torch.randint(tokenizer.get_vocab_size(), (2, B, MAX_SEQ_LEN), device=DEVICE)
    try:
        for _ in range(2):
            train_step(model, optimizer, itertools.repeat((*tokens, 1)), grad_accum_steps(B))
        check_model(model, tokenizer, B)
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, saved)
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        torch.manual_seed(SEED)


def fit_batch(model: nn.Module, optimizer: MuonAdamW, tokenizer: Tokenizer) -> int:
    """Rehearse with DEVICE_BATCH_SIZE rows, and with half as many for as long as memory runs out."""
    B = DEVICE_BATCH_SIZE
    while True:
        try:
            rehearse(model, optimizer, tokenizer, B)
            return B
        except RuntimeError as error:
            if B == 1 or not re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(error)):
                raise
        B //= 2  # out of the handler, so that what the failed attempt held can be freed
        torch._dynamo.reset()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory: device batch halved to {B} rows", flush=True)


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Tokenizer) -> str:
    """A short text from the model, begun at BOS."""
    ids = [tokenizer.get_bos_token_id()]
    for _ in range(SAMPLE_TOKENS):
        logits = model(torch.tensor([ids], device=DEVICE))[0, -1]
        ids.append(torch.multinomial(torch.softmax(logits.float() / 0.8, dim=-1), 1).item())
    return tokenizer.decode(ids[1:])


def main() -> None:
    """Train, evaluate and print the summary."""
    if SAVE and (Path(SAVE).is_dir() or not Path(SAVE).absolute().parent.is_dir()):
        stop(f"AUTORESEARCH_SAVE={SAVE} is no file in a folder that exists; make the folder, name a file")
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_directory()
    make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")  # bad data shows before compiling

    compiled = can_compile()
    config = GPTConfig(vocab_size=tokenizer.get_vocab_size())
    attention, attend = pick_attention(set(config.windows()), MAX_SEQ_LEN, compiled)
    raw_model = GPT(config, attend).to(DEVICE)
    optimizer = MuonAdamW(raw_model.param_groups(), compiled)
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    n_params = sum(p.numel() for p in raw_model.parameters())
    print(f"{device_name()}, {attention} attention, {COMPUTE_DTYPE}, {asdict(config)}", flush=True)
    B = fit_batch(model, optimizer, tokenizer)

    peak_flops = next((f for name, f in PEAK_FLOPS.items() if name in device_name()), None)

    def mfu(tokens: int, seconds: float) -> str:
        flops = raw_model.flops_per_token() * tokens / seconds
        return f"{100 * flops / peak_flops:.2f}" if peak_flops else "n/a"

    batches = make_dataloader(tokenizer, B, MAX_SEQ_LEN, "train")
    gc.collect()
    startup_seconds = time.time() - STARTED
    step, losses, next_log = 0, [], 0.0
    while clock.progress() < 1:
        factor = schedule(optimizer, step, clock.progress())
        loss, epoch = train_step(model, optimizer, batches, grad_accum_steps(B))
        losses.append(loss)
        step += 1
        if step == 1:
            gc.freeze()
            gc.disable()
        log = clock.progress() >= next_log
        if log or step % CHECK_EVERY == 0:
            mean_loss = torch.stack(losses).mean().item()
            losses.clear()
            if not mean_loss < 3 * math.log(config.vocab_size):  # NaN too
                print(f"FAIL: the loss is {mean_loss:.2f} at step {step}", flush=True)
                sys.exit(1)
        if log:
            next_log += LOG_EVERY
            tokens, seconds = step * TOTAL_BATCH_SIZE, clock.elapsed()
            print(
                f"step {step:05d} | {100 * clock.progress():5.1f}% | loss {mean_loss:.4f} | lr x{factor:.2f} "
                f"| {tokens / seconds / 1e3:,.0f}k tok/s | mfu {mfu(tokens, seconds)} | epoch {epoch}",
                flush=True,
            )
        if clock.progress() > 0.98:
            synchronize()  # so that no more than one step is under way when the time is up
    synchronize()
    training_seconds = clock.elapsed()

    evaluated = time.time()
    val_bpb = evaluate_bpb(model, tokenizer, B)
    eval_seconds = time.time() - evaluated
    try:
        print(f"sample: {sample(raw_model.eval(), tokenizer)!r}")
    except Exception as error:  # a model that scores well but cannot take a short text keeps its score
        print(f"sample: none ({first_line(error)})")
    print("---")
    print(f"val_bpb:          {val_bpb:.6f}")
    print(f"training_seconds: {training_seconds:.1f}")
    print(f"total_seconds:    {time.time() - STARTED:.1f}")
    print(f"peak_vram_mb:     {peak_memory_mb():.1f}")
    print(f"mfu_percent:      {mfu(step * TOTAL_BATCH_SIZE, training_seconds)}")
    print(f"total_tokens_M:   {step * TOTAL_BATCH_SIZE / 1e6:.1f}")
    print(f"num_steps:        {step}")
    print(f"num_params_M:     {n_params / 1e6:.1f}")
    print(f"depth:            {config.n_layer}")
    print(f"startup_seconds:  {startup_seconds:.1f}")
    print(f"eval_seconds:     {eval_seconds:.1f}")
    print(f"seed:             {SEED}")
    print(f"device:           {device_name()}")
    print(f"attention:        {attention}")
    print(f"source:           {prepared()[1]['source']}")
    print(f"epochs:           {epoch}")
    print(f"harness:          {harness_digest(tokenizer)}", flush=True)
    if SAVE:
        try:
            torch.save({"config": asdict(config), "model": raw_model.state_dict()}, SAVE + ".part")
            os.replace(SAVE + ".part", SAVE)
        except (OSError, RuntimeError) as error:
            stop(f"AUTORESEARCH_SAVE={SAVE} could not be written ({first_line(error)})")


if __name__ == "__main__":
    main()
