"""
A small GPT and its optimizer, trained for five minutes on one device. OPEN: improve this file.

    uv run train.py             # the constants below are the interface: edit them, or anything else
    SEED=2 uv run train.py      # the same run with other initial weights and another order of rows

The model is a GPT with
- rotary embeddings, QK-norm, grouped-query attention and sliding windows
- keys of which one half comes from the previous token
- value embeddings with gates on every other layer: of tokens and of hashed bigrams
- ReLU^2 in the MLP, and a causal convolution before it
- learned weights for the residual stream and for the embedding, which every layer gets back
- a soft cap on the logits, an output matrix of its own, no biases, no learned norms

Muon trains the matrices of the blocks, and AdamW everything else. Data, clock and metric come from
prepare.py, which is locked.
"""

import os
import signal
import time

STARTED = time.time()
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends the run at once

import ctypes
import gc
import math
import re
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# The libraries read these variables when they are imported. A value that is set already stays.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # prepare.py has fetched all there is to fetch
os.environ.setdefault("USER", str(os.getuid()))  # torch asks, and a container's user has no name
# FlashAttention-3 is an autograd function of its own; keep graphs with it between runs too.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")

import prepare

if os.access(prepare.CACHE, os.W_OK):  # compiled code outlives a reboot there
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(prepare.CACHE / "compiled"))

import torch
import torch._inductor.cpp_builder
import torch._inductor.cpu_vec_isa
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from prepare import DEVICE, MAX_SEQ_LEN, SCALE, Tokenizer, clock, evaluate_bpb, make_dataloader

# ---------------------------------------------------------------------------
# Hyperparameters


def by_scale(*, full, medium, small):
    """The value for the scale of the prepared text.

    `full` is for a CUDA GPU, `medium` for one with less than 40 GB, `small` for other machines.
    """
    return {"full": full, "medium": medium, "small": small}[SCALE]


# model
DEPTH = by_scale(full=9, medium=6, small=2)  # the dial for the size: the width follows
ASPECT_RATIO = by_scale(full=56, medium=64, small=128)  # width divided by depth
HEAD_DIM = 128
N_EMBD = HEAD_DIM * math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM)  # width, rounded up to whole heads
N_KV_HEAD = N_EMBD // HEAD_DIM  # as many as query heads; with fewer, query heads share them
# The pattern repeats over the layers. An S layer sees a short window, and an L layer all tokens.
WINDOW_PATTERN = by_scale(full="SSSSL", medium="SSSL", small="L")
SHORT_WINDOW = by_scale(full=256, medium=256, small=64)  # earlier tokens that an S layer sees
ROPE_BASE = by_scale(full=200_000, medium=100_000, small=10_000)  # more for longer sequences
GATE_CHANNELS = 32  # first channels of x, from which the gates of value embeddings are computed
BIGRAM_ROWS = by_scale(full=2**17, medium=2**16, small=2**15)  # rows of each table
CONV_TAPS = 3  # earlier tokens that the convolution adds to each token
SOFTCAP = 15.0  # logits stay within +-SOFTCAP

# initial values
INIT_SCALE = by_scale(full=0.68, medium=0.68, small=1.0)  # of the matrices not zero at first
X0_INIT = by_scale(full=0.05, medium=0.05, small=0.1)  # of the embedding that every layer gets back

# batch
TOTAL_BATCH_SIZE = by_scale(full=2**17, medium=2**16, small=2**13)  # tokens in one optimizer step
DEVICE_BATCH_SIZE = by_scale(full=64, medium=32, small=16)  # rows in a pass; halved until it fits

# optimizer; the rates of embeddings and head are multiplied by (N_EMBD / 768) ** -0.5
EMBEDDING_LR = by_scale(full=0.9, medium=0.6, small=0.6)
UNEMBEDDING_LR = by_scale(full=0.005, medium=0.004, small=0.004)
MATRIX_LR = 0.04
X0_LR = 0.5
RESID_LR = 0.005  # also of parameters of a block that are no matrices
CONV_LR = 0.02
ADAM_BETAS = (0.8, 0.95)
X0_BETAS = (0.96, 0.95)
WEIGHT_DECAY = 0.2  # of Muon's matrices; falls to zero over the run
VE_WEIGHT_DECAY = by_scale(full=0.003, medium=0.003, small=0.0)  # of the token and bigram tables
MOMENTUM = 0.95  # of Muon
MOMENTUM_START = 0.85  # of Muon at the first step
MOMENTUM_STEPS = 200  # steps from MOMENTUM_START to MOMENTUM
VARIANCE_BETA = 0.95  # of the running variance by which Muon's updates are scaled

# learning-rate schedule, in shares of the time budget
WARMUP_RATIO = 0.0
WARMDOWN_RATIO = 0.75
FINAL_LR_FRAC = by_scale(full=0.05, medium=0.05, small=0.0)  # what is left of each rate at the end

# run
SEED = prepare.from_environment("SEED", 1, int, 0, 2**31)
SAVE = os.environ.get("AUTORESEARCH_SAVE")  # a file for the weights and the configuration
LOG_EVERY = 0.02  # share of the budget between two log lines, and two looks at the loss

# ---------------------------------------------------------------------------
# Machine

try:  # a container may have fewer CPUs than torch sees
    quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    torch.set_num_threads(max(1, min(torch.get_num_threads(), round(quota / period))))
except (OSError, ValueError):
    pass  # no container, or one without a limit
# inductor compiles a test program for each set of instructions, and loads it in a new Python that
# imports torch. But torch.cpu has told already what the processor knows, so nothing is left to
# load: 4 s less in every start.
torch._inductor.cpu_vec_isa.VecISA._avx_py_load = ""
# gcc 11 and 12 vectorise straight-line code wrongly where inductor transposes tiles of bfloat16: on
# a Xeon with AVX-512 the gradients of the keys were NaN.
math_flags = torch._inductor.cpp_builder._get_ffast_math_flags
torch._inductor.cpp_builder._get_ffast_math_flags = lambda: (
    math_flags() + ["fno-tree-slp-vectorize"]
)
if DEVICE == "cpu" and sys.platform == "linux":
    # Freed memory stays for the next step: 6% more steps, and an evaluation of 14 s in place of 18.
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
# COMPUTE_DTYPE is that of the activations. The weights stay in float32.
CPU = torch.cpu.get_capabilities()
CPU_NAME = CPU.get("cpu_name") or os.uname().machine
if DEVICE == "cuda":
    DEVICE_NAME = torch.cuda.get_device_name()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    COMPUTE_DTYPE = torch.bfloat16 if has_bf16 else torch.float16  # on a T4 and an RTX 20
elif DEVICE == "mps":
    DEVICE_NAME = f"{CPU_NAME} mps"
    COMPUTE_DTYPE = torch.bfloat16  # comes with macOS 14, without which PyTorch has no MPS
else:
    DEVICE_NAME = f"{CPU_NAME} cpu, {torch.get_num_threads()} threads"
    has_bf16 = any(CPU.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    COMPUTE_DTYPE = torch.bfloat16 if has_bf16 else torch.float32
# In float16 a gradient below 6e-8 becomes zero, and many are that small. So the loss is multiplied
# by LOSS_SCALE. The gradients keep this factor, because Muon and AdamW divide a gradient by its own
# size. An optimizer or a clipping that does not must divide by LOSS_SCALE first.
LOSS_SCALE = 2.0**12 if COMPUTE_DTYPE is torch.float16 else 1.0

# ---------------------------------------------------------------------------
# Model


@dataclass
class GPTConfig:
    """All that determines the shape and the function of a GPT. It is saved with the weights."""

    sequence_len: int = MAX_SEQ_LEN
    vocab_size: int = prepare.SCALES[SCALE].vocab_size
    n_layer: int = DEPTH
    n_embd: int = N_EMBD
    n_head: int = N_EMBD // HEAD_DIM
    n_kv_head: int = N_KV_HEAD
    window_pattern: str = WINDOW_PATTERN
    short_window: int = SHORT_WINDOW
    rope_base: float = ROPE_BASE
    gate_channels: int = GATE_CHANNELS
    bigram_rows: int = BIGRAM_ROWS
    conv_taps: int = CONV_TAPS
    softcap: float = SOFTCAP

    def windows(self) -> list[int]:
        """For each layer, how many earlier tokens a token sees. The last layer always sees all."""
        pattern = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return [self.short_window if letter == "S" else self.sequence_len for letter in pattern]

    def value_tables(self, layer: int) -> int:
        """How many value embeddings a layer has: none, one (tokens) or two (tokens and bigrams)."""
        if (self.n_layer - 1 - layer) % 2 == 0:  # every other layer, the last one included
            return 2 if self.bigram_rows else 1
        return 0


class Linear(nn.Linear):
    """A linear map without bias, which casts its float32 weight to the dtype of the activations.

    A parameter of your own needs the same cast, unless it is 0-D.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def shift(x: torch.Tensor) -> torch.Tensor:
    """Move x (B, T, ...) one token to the right: each place holds the token before it."""
    padding = (0, 0) * (x.dim() - 2) + (1, -1)  # from the last dimension on: only T is shifted
    return F.pad(x, padding)


def causal_conv(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Add to x (B, T, C) its earlier tokens, weighted by channel: taps (n, C) for n of them."""
    n, T = len(taps), x.size(1)
    padded = F.pad(x, (0, 0, n, 0))  # (B, n + T, C), kept once for the backward pass
    for i, tap in enumerate(taps.to(x.dtype)):
        start = n - 1 - i  # i + 1 tokens earlier
        x = x + tap * padded[:, start : start + T]
    return x


def hash_bigrams(idx: torch.Tensor, n_rows: int) -> torch.Tensor:
    """The table row (B, T) of each pair that a token of idx (B, T) forms with the one before."""
    # Two arbitrary large odd factors scatter the pairs over the rows, as in modded-nanogpt.
    return ((shift(idx) * 36313) ^ (idx * 27191)) % n_rows


def rotary_tables(T: int, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of RoPE (arXiv 2104.09864), each (1, T, 1, 2, head_dim / 2)."""
    half = head_dim // 2
    frequency = base ** -(torch.arange(half) / half)
    angle = torch.outer(torch.arange(T), frequency)[None, :, None, :]
    angles = torch.stack([angle, -angle], dim=-2)  # for the first half of a head, and the second
    return angles.cos().to(COMPUTE_DTYPE), angles.sin().to(COMPUTE_DTYPE)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head of x (B, T, n_head, head_dim) by an angle that depends on the position."""
    # The compiler fuses a flip, and not the cat of two rotated halves: 3% of a step on an H100.
    halves = x.unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2)


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention of q (B, T, n_head, head_dim) over k and v (B, T, n_kv_head, head_dim).

    Each token sees itself and `window` tokens before it. Scores are scaled by head_dim ** -0.5.
    Returns (B, T, n_head, head_dim). This is PyTorch's kernel; others are under attention backends.
    """
    T, mask = q.size(1), None
    if window < T - 1:
        position = torch.arange(T, device=q.device)
        distance = position[:, None] - position
        mask = (distance >= 0) & (distance <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.size(1) != k.size(1)
    )
    return y.transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with QK-norm (2010.04245) and value embeddings."""

    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.gate_channels = config.gate_channels
        self.window = config.windows()[layer]
        self.attend = attend
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd)
        n_gates = config.value_tables(layer)
        gates = [Linear(self.gate_channels, self.n_kv_head) for _ in range(n_gates)]
        self.ve_gates = nn.ModuleList(gates)

    def forward(self, x, value_embeds, cos, sin):
        B, T, _ = x.size()
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)

        # Half of each key comes from the previous token: one layer can form an induction head.
        own, previous = k.chunk(2, dim=-1)
        k = torch.cat([own, shift(previous)], dim=-1)

        # Value embeddings (arXiv 2410.17897), scaled for each head by a gate
        for gate, embedded in zip(self.ve_gates, value_embeds, strict=True):
            scale = 2 * torch.sigmoid(gate(x[..., : self.gate_channels]))  # (B, T, n_kv_head)
            v = v + scale.unsqueeze(-1) * embedded.view(B, T, self.n_kv_head, self.head_dim)

        q = apply_rotary(norm(q), cos, sin)
        k = apply_rotary(norm(k), cos, sin)
        y = self.attend(q, k, v, self.window)  # (B, T, n_head, head_dim)
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, attend)
        self.mlp = MLP(config)

    def forward(self, x, value_embeds, taps, cos, sin):
        x = x + self.attn(norm(x), value_embeds, cos, sin)
        return x + self.mlp(causal_conv(norm(x), taps))  # as in Primer, but before the MLP


class GPT(nn.Module):
    """model(idx) gives logits (B, T, vocab_size); model(idx, targets) gives the mean loss."""

    def __init__(self, config: GPTConfig, attend: Callable = sdpa_attention):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, i, attend) for i in range(config.n_layer)])
        self.lm_head = Linear(config.n_embd, config.vocab_size)

        # Value embeddings by layer: a row for each token, and a row for each hashed bigram.
        head_dim = config.n_embd // config.n_head
        kv_dim = config.n_kv_head * head_dim
        self.value_embeds, self.bigram_embeds = nn.ModuleDict(), nn.ModuleDict()
        for i in range(config.n_layer):
            if config.value_tables(i) >= 1:
                self.value_embeds[str(i)] = nn.Embedding(config.vocab_size, kv_dim)
            if config.value_tables(i) == 2:
                self.bigram_embeds[str(i)] = nn.Embedding(config.bigram_rows, kv_dim)

        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), X0_INIT))
        self.conv_taps = nn.Parameter(torch.zeros(config.n_layer, config.conv_taps, config.n_embd))
        cos, sin = rotary_tables(config.sequence_len, head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """At first every block is the identity. __init__ sets the lambdas and the taps.

        wte                            normal, standard deviation 1
        lm_head                        normal, standard deviation 0.001
        c_q, c_k, c_v, mlp.c_fc        uniform, standard deviation INIT_SCALE / sqrt(n_embd)
        a Linear that you add          PyTorch's default, standard deviation 0.58 / sqrt(inputs)
        attn.c_proj, mlp.c_proj        zero
        ve_gates                       zero, which makes every gate 1
        value_embeds, bigram_embeds    zero
        """
        bound = INIT_SCALE * math.sqrt(3 / self.config.n_embd)
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            nn.init.uniform_(block.attn.c_q.weight, -bound, bound)
            nn.init.uniform_(block.attn.c_k.weight, -bound, bound)
            nn.init.uniform_(block.attn.c_v.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            for gate in block.attn.ve_gates:
                nn.init.zeros_(gate.weight)
            nn.init.uniform_(block.mlp.c_fc.weight, -bound, bound)
            nn.init.zeros_(block.mlp.c_proj.weight)
        for table in [*self.value_embeds.values(), *self.bigram_embeds.values()]:
            nn.init.zeros_(table.weight)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        with torch.enable_grad():  # always, so that training and evaluation share a compiled graph
            x = self.trunk(idx)
        if not torch.is_grad_enabled():
            x = x.detach()  # frees what the trunk has kept for a backward pass
        return self.head(x, targets)

    def trunk(self, idx: torch.Tensor) -> torch.Tensor:
        """From token ids (B, T) to what the head reads, (B, T, n_embd)."""
        T = idx.size(1)
        cos, sin = self.cos[:, :T], self.sin[:, :T]
        bigrams = hash_bigrams(idx, self.config.bigram_rows) if self.config.bigram_rows else None
        x = x0 = norm(self.wte(idx).to(COMPUTE_DTYPE))  # (B, T, n_embd)
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value_embeds = []  # (B, T, kv_dim) each
            if str(i) in self.value_embeds:
                value_embeds.append(self.value_embeds[str(i)](idx).to(x.dtype))
            if str(i) in self.bigram_embeds:
                value_embeds.append(self.bigram_embeds[str(i)](bigrams).to(x.dtype))
            x = block(x, value_embeds, self.conv_taps[i], cos, sin)
        return norm(x)

    def head(self, x: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """Logits (B, T, vocab_size) or, with targets (B, T), the mean loss."""
        # Flat logits let the compiler fuse the cap into the loss, without a float32 copy of them.
        logits = self.lm_head(x.flatten(0, 1)).float()  # (B * T, vocab_size)
        # Like softcap * tanh(logits / softcap), but cheaper.
        logits = logits * torch.rsqrt(1 + (logits / self.config.softcap).square())
        if targets is None:
            return logits.view(*x.shape[:2], -1)
        return F.cross_entropy(logits, targets.flatten())

    def param_groups(self) -> list[dict]:
        """Matrices of the blocks go to Muon, by shape, and everything else to AdamW."""
        lr_scale = (self.config.n_embd / 768) ** -0.5
        tables = [*self.value_embeds.parameters(), *self.bigram_embeds.parameters()]
        matrices, others = [], []  # there are no others at first
        for p in self.blocks.parameters():
            if p.dim() == 2 and min(p.shape) > 1:
                matrices.append(p)
            else:
                others.append(p)
        groups = [
            {"params": [self.lm_head.weight], "lr": UNEMBEDDING_LR * lr_scale},
            {"params": [self.wte.weight], "lr": EMBEDDING_LR * lr_scale},
            {"params": tables, "lr": EMBEDDING_LR * lr_scale, "weight_decay": VE_WEIGHT_DECAY},
            {"params": [self.resid_lambdas, *others], "lr": RESID_LR},
            {"params": [self.x0_lambdas], "lr": X0_LR, "betas": X0_BETAS},
            {"params": [self.conv_taps], "lr": CONV_LR},
        ]
        for shape in sorted({p.shape for p in matrices}):
            same = [p for p in matrices if p.shape == shape]
            betas = (MOMENTUM_START, VARIANCE_BETA)  # schedule() overwrites the first one
            groups.append({"kind": "muon", "params": same, "lr": MATRIX_LR, "betas": betas})
        grouped = [id(p) for group in groups for p in group["params"]]
        for name, parameter in self.named_parameters():
            count = grouped.count(id(parameter))
            assert count == 1, f"{name} is in {count} groups; param_groups() must put it into one"
        return groups

    def flops_per_token(self) -> float:
        """6 for each weight of a matrix product, and 12 for each channel of each attended token."""
        weights = self.lm_head.weight.numel() + sum(p.numel() for p in self.blocks.parameters())
        seen = sum(min(window + 1, self.config.sequence_len) for window in self.config.windows())
        return 6 * weights + 12 * self.config.n_embd * seen


# ---------------------------------------------------------------------------
# Optimizer

# Polar Express (arXiv 2505.16932): the coefficients of x, x^3 and x^5 in each of five steps towards
# the nearest orthogonal matrix
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of matrices (K, m, n) to about one: U S V^T becomes U V^T."""
    norms = matrices.norm(dim=(-2, -1), keepdim=True)
    x = (matrices / (1.02 * norms + 1e-6)).to(COMPUTE_DTYPE)  # no singular value above one
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT.contiguous() if tall else x


def muon_step(group: dict) -> None:
    """Muon (arXiv 2502.16982) for K matrices (m, n), with NorMuon and cautious weight decay."""
    params, lr, (beta1, beta2) = group["params"], group["lr"], group["betas"]
    m, n = params[0].shape
    # Nesterov momentum, then the nearest orthogonal matrix
    grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    group["momentum"] = grad.lerp(group["momentum"], beta1)  # (K, m, n)
    update = grad.lerp(group["momentum"], beta1)
    update = orthogonalize(update).float()

    # NorMuon (arXiv 2510.05491): divide each row, or each column of a wide matrix, by its
    # running root mean square, then give each matrix its norm back.
    dim = -1 if m >= n else -2
    mean_square = update.square().mean(dim, keepdim=True)
    group["variance"] = mean_square.lerp(group["variance"], beta2)
    inverse = group["variance"].clamp_min(1e-10).rsqrt()
    before = mean_square.sum((-2, -1), keepdim=True)  # squared norms, but for a factor
    after = (mean_square * inverse.square()).sum((-2, -1), keepdim=True)
    update = update * inverse * (before / after.clamp_min(1e-10)).sqrt()

    # Cautious decay (arXiv 2510.12402): weights decay only where the update shrinks them too.
    weights = torch.stack(params)
    shrinks = update * weights >= 0
    scale = max(1, m / n) ** 0.5  # tall matrices take larger steps
    step = scale * lr * (update + group["weight_decay"] * weights * shrinks)
    torch._foreach_sub_(params, step.unbind())  # one launch on a GPU


class MuonAdamW:
    """Muon for groups of kind "muon", whose matrices share a shape, and torch's AdamW for the rest.

    Compiling them saves at most 1.5% of a step, and costs 9 to 20 s when a changed model starts.
    """

    def __init__(self, groups: list[dict]):
        defaults = {"kind": "adamw", "betas": ADAM_BETAS, "weight_decay": 0.0}
        groups = [{**defaults, **group, "initial_lr": group["lr"]} for group in groups]
        self.muon = [group for group in groups if group["kind"] == "muon"]
        others = [group for group in groups if group["kind"] == "adamw"]
        self.adamw = torch.optim.AdamW(others, eps=1e-10, fused=True)
        self.param_groups = [*self.adamw.param_groups, *self.muon]
        self.reset()

    def reset(self) -> None:
        """Begin anew, with all moments at zero."""
        self.adamw.state.clear()
        for group in self.muon:
            group["momentum"] = group["variance"] = group["params"][0].new_zeros(())

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        for group in self.muon:
            muon_step(group)


def lr_factor(progress: float) -> float:
    """The factor on all learning rates at a share of the budget: it rises, stays, and falls."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    left = (1 - progress) / WARMDOWN_RATIO  # falls from 1 to 0
    return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * left


def schedule(optimizer: MuonAdamW, step: int, progress: float) -> float:
    """Set all learning rates, and one momentum and weight decay for all that Muon trains.

    Returns the factor on the rates.
    """
    factor = lr_factor(progress)
    ramp = min(1, step / max(1, MOMENTUM_STEPS))
    momentum = MOMENTUM_START + (MOMENTUM - MOMENTUM_START) * ramp
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    for group in optimizer.muon:
        group["betas"] = (momentum, group["betas"][1])
        group["weight_decay"] = WEIGHT_DECAY * (1 - progress)
    return factor


# ---------------------------------------------------------------------------
# Attention backends: the same function as sdpa_attention, but faster where they work

QUERY_BLOCK = 128  # queries in one block


def blocked_attention(q, k, v, window: int) -> torch.Tensor:
    """Blocks of queries against the keys that they see. The fastest on a CPU, once compiled."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, n_head, T, head_dim)
    T, scale = q.size(2), q.size(3) ** -0.5
    group = q.size(1) // k.size(1)  # query heads that share a key head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        first = max(0, start - window)
        distance = torch.arange(start, end)[:, None] - torch.arange(first, end)
        hidden = (distance < 0) | (distance > window)
        scores = (q[:, :, start:end] @ k[:, :, first:end].mT) * scale
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        outputs.append(weights @ v[:, :, first:end])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def flex_backend(windows: set[int], T: int) -> Callable:
    """FlexAttention, which skips the blocks that a window hides. It is fast only when compiled."""

    def block_mask(window: int):
        def visible(b, h, q, k):
            return (q >= k) & (q - k <= window)

        return create_block_mask(visible, None, None, T, T, DEVICE)

    masks = {window: block_mask(window) for window in windows if window < T - 1}

    def attend(q, k, v, window):
        # The masks are for T tokens, and FlexAttention is for compiled code.
        if window not in masks or q.size(1) != T or not torch.compiler.is_compiling():
            return sdpa_attention(q, k, v, window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = flex_attention(q, k, v, block_mask=masks[window], enable_gqa=True)
        return y.transpose(1, 2)

    return attend


def fa3_backend() -> Callable:
    """FlashAttention-3, from where prepare.py has put it."""
    from kernels import get_kernel

    repo, version = prepare.ATTENTION_KERNEL
    if prepare.KERNEL_PATH.exists():
        os.environ.setdefault("LOCAL_KERNELS", f"{repo}={prepare.KERNEL_PATH.read_text()}")
    kernel = get_kernel(repo, version=version)
    kernel = getattr(kernel, "flash_attn_interface", kernel)

    def attend(q, k, v, window):
        return kernel.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    return attend


def probe_attention(attend: Callable, windows: set[int], T: int, compiled: bool) -> None:
    """Run a backend forward and backward. Raises whatever goes wrong, wrong results included."""
    if compiled:
        attend = torch.compile(attend, dynamic=False)
    like = {"device": DEVICE, "dtype": COMPUTE_DTYPE, "requires_grad": True}
    heads = (N_EMBD // HEAD_DIM, N_KV_HEAD, N_KV_HEAD)
    for window in windows:
        qkv = [torch.randn(1, T, n, HEAD_DIM, **like) for n in heads]
        results = []
        for function in (attend, sdpa_attention):
            y = function(*qkv, window)
            results.append([y, *torch.autograd.grad(y.square().sum(), qkv)])
        for ours, reference in zip(*results, strict=True):
            error = (ours - reference).float().norm()
            if not error < 0.02 * reference.float().norm():  # NaN fails too
                raise RuntimeError("its results differ from scaled_dot_product_attention")


def pick_attention(windows: set[int], T: int, compiled: bool) -> tuple[str, Callable]:
    """Name and function of the fastest backend that works here; says why a faster one does not."""
    if DEVICE == "cpu" and compiled:
        return "blocked", blocked_attention
    backends = {}
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] in (8, 9):
        backends["fa3"] = fa3_backend
    if DEVICE == "cuda" and compiled and min(windows) < T - 1:  # some layers have short windows
        backends["flex"] = lambda: flex_backend(windows, T)
    for name, backend in backends.items():
        try:
            attend = backend()
            probe_attention(attend, windows, T, compiled)
            return name, attend
        except Exception as error:  # a missing kernel, a wrong build, a failed launch, and more
            print(f"attention: {name} cannot be used here ({prepare.reason(error)})")
    return "sdpa", sdpa_attention


# ---------------------------------------------------------------------------
# Rehearsal: compile, find a batch that fits, and check the model, all before the clock starts

# The allocators say the first two of these, cuBLAS the next two, and FlashAttention-3 the last.
OUT_OF_MEMORY = "out of memory|can't allocate memory|ALLOC_FAILED|NOT_INITIALIZED|API call failed"


def can_compile() -> bool:
    """Whether torch.compile works here. If not, one line says why."""
    try:
        if DEVICE == "mps":
            raise RuntimeError("it is not reliable on Apple's MPS")
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.ones(8, device=DEVICE))
        return True
    except Exception as error:  # no C++ compiler, no Triton, no Python headers, and more
        why = prepare.reason(error)
        print(f"torch.compile cannot be used ({why}); running eagerly")
        print("WARNING: its val_bpb does not compare with a compiled run's. See README.md, errors.")
        return False


def grad_accum_steps(B: int) -> int:
    """How many batches of B rows make one optimizer step."""
    steps, rest = divmod(TOTAL_BATCH_SIZE, B * MAX_SEQ_LEN)
    if rest or not steps:
        wrong = f"TOTAL_BATCH_SIZE {TOTAL_BATCH_SIZE} is no multiple of {B} x {MAX_SEQ_LEN}"
        raise prepare.Refusal(f"{wrong}; lower DEVICE_BATCH_SIZE")
    return steps


def train_step(model: nn.Module, optimizer: MuonAdamW, batches: Iterator, accum: int) -> tuple:
    """One optimizer step over `accum` batches. Returns the mean loss (0-D) and the epoch."""
    total = 0.0
    for _ in range(accum):
        inputs, targets, epoch = next(batches)
        loss = model(inputs, targets) / accum
        (LOSS_SCALE * loss).backward()
        total = total + loss.detach()
    optimizer.step()
    model.zero_grad()
    return total, epoch


def rehearse(model: nn.Module, optimizer: MuonAdamW, tokenizer: Tokenizer, B: int) -> None:
    """Take two steps on random tokens and check the model, then restore all that this changed."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    inputs, targets = torch.randint(tokenizer.get_vocab_size(), (2, B, MAX_SEQ_LEN), device=DEVICE)
    accum = grad_accum_steps(B)
    prepare.watch(prepare.STARTUP_SECONDS)  # every attempt gets the full time
    try:
        for _ in range(2):
            train_step(model, optimizer, iter([(inputs, targets, 1)] * accum), accum)
        prepare.check_model(model, tokenizer, B)
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, saved)
        model.zero_grad()
        optimizer.reset()
        model.train()
        torch.manual_seed(SEED)


def fit_batch(model: nn.Module, optimizer: MuonAdamW, tokenizer: Tokenizer) -> int:
    """Rehearse with DEVICE_BATCH_SIZE rows, then half as many for as long as memory runs out."""
    B = DEVICE_BATCH_SIZE
    while True:
        try:
            rehearse(model, optimizer, tokenizer, B)
            return B
        except RuntimeError as error:
            if B == 1 or not re.search(OUT_OF_MEMORY, str(error)):
                raise
        # Outside of the handler nothing holds the failed attempt's tensors any more.
        B //= 2
        torch._dynamo.reset()  # its guards hold tensors as well
        gc.collect()
        torch.cuda.empty_cache()
        print(f"out of memory: device batch halved to {B} rows")


# ---------------------------------------------------------------------------
# Training

# Dense TFLOP/s in bf16, or in float16 for a T4, by a pattern in the GPU's name; the first match
# counts. From NVIDIA's data sheets; for the RTX 3060, 4060 and 4070 from cores and clock.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989}
PEAK_TFLOPS |= {"GB200": 2500, "B200": 2250, "A100": 312, "L40S": 362, "A10G": 70, "T4$": 65}
PEAK_TFLOPS |= {"RTX 3060$": 25.5, "RTX 3080$": 59.5, "RTX 3090$": 71, "RTX 4060$": 30.2}
PEAK_TFLOPS |= {"RTX 4070$": 58.3, "RTX 4090$": 165, "RTX 5090$": 209.5}


def mfu_percent(flops: float, seconds: float) -> str:
    """Model FLOPs utilisation: the share of the GPU's peak; n/a where the peak is not known."""
    for pattern, peak in PEAK_TFLOPS.items():
        if re.search(pattern, DEVICE_NAME):
            return f"{100 * flops / seconds / (peak * 1e12):.2f}"
    return "n/a"


def peak_memory_mb() -> float:
    """Peak of the GPU's memory; without CUDA, of the process's."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def train_loop(model: nn.Module, optimizer: MuonAdamW, batches: Iterator, accum: int) -> tuple:
    """Train until the budget is spent. Returns the number of steps and the epoch reached."""
    gc.collect()
    gc.freeze()
    gc.disable()  # no collection in the middle of a step
    largest_loss = 3 * math.log(model.config.vocab_size)  # three times that of a uniform guess
    step, epoch, next_log = 0, 0, 0.0
    while clock.progress() < 1:
        factor = schedule(optimizer, step, clock.progress())
        loss, epoch = train_step(model, optimizer, batches, accum)
        step += 1
        if clock.progress() >= next_log:
            next_log += LOG_EVERY
            if not loss.item() < largest_loss:  # NaN fails too
                print(f"FAIL: the loss is {loss:.2f} at step {step}")
                sys.exit(1)
            tokens, seconds = step * TOTAL_BATCH_SIZE, clock.elapsed()
            mfu = mfu_percent(tokens * model.flops_per_token(), seconds)
            print(
                f"step {step:05d} | {100 * clock.progress():5.1f}% | loss {loss:.4f} "
                f"| lr x{factor:.2f} | {tokens / seconds:,.0f} tok/s | mfu {mfu} | epoch {epoch}"
            )
        if DEVICE != "cpu" and clock.progress() > 0.98:
            torch.accelerator.synchronize()  # or the host would start steps that cannot end in time
    return step, epoch


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # every step has another length
def sample(model: nn.Module, tokenizer: Tokenizer) -> str:
    """A short text that the model writes from BOS on."""
    ids = [tokenizer.get_bos_token_id()]
    for _ in range(64):
        logits = model(torch.tensor([ids], device=DEVICE))[0, -1]
        probabilities = torch.softmax(logits / 0.8, dim=-1)
        ids.append(torch.multinomial(probabilities, 1).item())
    return tokenizer.decode(ids[1:])


def main() -> None:
    """Train, evaluate, print the summary, and save the model if that was asked for."""
    # Lines reach a log at once, and a sample may hold any character.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    if SAVE and (SAVE.endswith("/") or Path(SAVE).is_dir() or not Path(SAVE).parent.is_dir()):
        raise prepare.Refusal(f"AUTORESEARCH_SAVE={SAVE} is no file in an existing folder")
    if N_EMBD % HEAD_DIM or (N_EMBD // HEAD_DIM) % N_KV_HEAD:
        raise prepare.Refusal("HEAD_DIM must divide N_EMBD, and N_KV_HEAD the number of heads")
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its results do not repeat bitwise
    tokenizer = Tokenizer.from_directory()
    make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN)  # reads ahead while we compile

    compiled = can_compile()
    device_name = DEVICE_NAME if compiled else f"{DEVICE_NAME}, eager"
    config = GPTConfig(vocab_size=tokenizer.get_vocab_size())
    attention, attend = pick_attention(set(config.windows()), MAX_SEQ_LEN, compiled)
    with torch.device(DEVICE):
        model = GPT(config, attend)
    optimizer = MuonAdamW(model.param_groups())
    if compiled:
        # A Python number in them that changes during training compiles again, on the clock. They
        # are compiled on the class, because a copy of a model would keep the model's own methods.
        GPT.trunk = torch.compile(GPT.trunk, dynamic=False)
        GPT.head = torch.compile(GPT.head, dynamic=False)
    print(f"starting on {device_name}, {attention}, {COMPUTE_DTYPE}, {asdict(config)}")
    print("compiling and checking the model")
    B = fit_batch(model, optimizer, tokenizer)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without the batches that did not fit

    batches = make_dataloader(tokenizer, B, MAX_SEQ_LEN)
    startup_seconds = time.time() - STARTED
    steps, epoch = train_loop(model, optimizer, batches, grad_accum_steps(B))
    training_seconds = clock.elapsed()
    print("evaluating")
    evaluate_bpb(model, tokenizer, B)
    eval_seconds = clock.elapsed() - training_seconds
    try:
        print(f"sample: {sample(model.eval(), tokenizer)!r}")
    except Exception as error:  # a model that cannot take a short text keeps its score
        print(f"sample: none ({prepare.reason(error)})")

    flops = steps * TOTAL_BATCH_SIZE * model.flops_per_token()
    summary = {
        "total_seconds": f"{time.time() - STARTED:.1f}",
        "peak_vram_mb": f"{peak_memory_mb():.1f}",
        "mfu_percent": mfu_percent(flops, training_seconds),
        "num_steps": steps,
        "num_params_M": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        "depth": config.n_layer,
        "startup_seconds": f"{startup_seconds:.1f}",
        "eval_seconds": f"{eval_seconds:.1f}",
        "seed": SEED,
        "device": device_name,
        "attention": attention,
        "epochs": epoch,
    }
    prepare.print_summary(summary)  # with val_bpb, which only the harness reports
    if SAVE:
        try:
            torch.save({"config": asdict(config), "model": model.state_dict()}, SAVE + ".part")
            os.replace(SAVE + ".part", SAVE)
        except (OSError, RuntimeError) as error:
            why = f"could not be written ({prepare.reason(error)})"
            raise prepare.Refusal(f"AUTORESEARCH_SAVE={SAVE} {why}") from None


if __name__ == "__main__":
    main()
