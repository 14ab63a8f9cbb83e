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

import ctypes
import gc
import math
import re
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors on huge pages: fewer page faults on a CPU
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # prepare.py has fetched all there is to fetch
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # fewer tests of the compiler in every run
# keep the traced graphs between runs also with FlashAttention-3, which is an autograd function of its own
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import prepare
from prepare import DEVICE, MAX_SEQ_LEN, SCALE, Tokenizer, clock, evaluate_bpb, make_dataloader, stop

# ---------------------------------------------------------------------------
# Hyperparameters, each for the two scales of prepare.py


def by_scale(full, small):
    """The first value at scale `full`, the second at `small`."""
    return full if SCALE == "full" else small


# model
DEPTH = by_scale(9, 3)  # a CPU is short of arithmetic: a fourth layer costs more tokens than it is worth
N_EMBD = by_scale(512, 256)
HEAD_DIM = 128
N_KV_HEAD = N_EMBD // HEAD_DIM  # fewer than the N_EMBD / HEAD_DIM query heads: grouped-query attention
WINDOW_PATTERN = by_scale("SSSSL", "L")  # repeated over the layers: S sees SHORT_WINDOW tokens back, L all
SHORT_WINDOW = by_scale(256, 64)
ROPE_BASE = by_scale(200_000, 10_000)  # more for longer sequences
SOFTCAP = 15.0  # logits stay within +-SOFTCAP
BIGRAM_ROWS = by_scale(2**17, 0)  # rows of a value embedding for hashed pairs of tokens; too slow for a CPU
CONV_TAPS = by_scale(0, 3)  # earlier tokens that the convolution before an MLP sees; not measured at full
GATE_CHANNELS = 32  # of the input, that decide how much of a value embedding comes in
INIT_SCALE = by_scale(0.68, 1.0)  # of Q, K, V and the MLP's first matrix
X0_INIT = by_scale(0.05, 0.1)  # share of the embedding that every layer gets back at first

# batch
TOTAL_BATCH_SIZE = by_scale(2**18, 2**13)  # tokens per step: a multiple of DEVICE_BATCH_SIZE * MAX_SEQ_LEN
DEVICE_BATCH_SIZE = by_scale(64, 16)  # rows per forward pass; halves itself when memory runs out

# optimizer; the rates of embeddings and head are for a width of 768 and grow as (N_EMBD / 768) ** -0.5
EMBEDDING_LR = by_scale(0.9, 0.6)
UNEMBEDDING_LR = by_scale(0.005, 0.004)
MATRIX_LR = 0.04
SCALAR_LR = 0.5
CONV_LR = 0.02
ADAM_BETAS = (0.8, 0.95)
WEIGHT_DECAY = 0.2  # of Muon's matrices, down to zero over the run
VE_WEIGHT_DECAY = by_scale(0.003, 0.0)  # of value embeddings
MOMENTUM, MOMENTUM_START, MOMENTUM_STEPS = 0.95, 0.85, 200  # of Muon: from START over STEPS steps

# schedule, in shares of the time budget
WARMDOWN_RATIO = 0.75
FINAL_LR_FRAC = by_scale(0.05, 0.0)

SEED = prepare.from_environment("SEED", 1, int, 0, 2**31)
SAVE = os.environ.get("AUTORESEARCH_SAVE")  # a file for weights and configuration
LOG_EVERY, CHECK_EVERY = 0.02, 10  # share of the budget between lines; steps between looks at the loss

if DEVICE == "cuda":
    DEVICE_NAME = torch.cuda.get_device_name()
    FAST_BF16 = torch.cuda.is_bf16_supported(including_emulation=False)
else:
    CPU = torch.cpu.get_capabilities()
    DEVICE_NAME = f"{CPU.get('cpu_name') or os.uname().machine} {DEVICE}, {torch.get_num_threads()} threads"
    FAST_BF16 = any(CPU.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
if DEVICE == "mps":
    FAST_BF16 = torch.backends.mps.is_macos_or_newer(14, 0)
COMPUTE_DTYPE = torch.bfloat16 if FAST_BF16 else torch.float32  # of activations; parameters are float32

# ---------------------------------------------------------------------------
# Attention: four backends, one function
# attend(q, k, v, window) takes q (B, T, n_head, head_dim), k and v (B, T, n_kv_head, head_dim) and gives
# (B, T, n_head, head_dim). A token sees itself and `window` tokens before it, as in FlashAttention-3.


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """PyTorch's scaled_dot_product_attention, on any device."""
    T, mask = q.size(1), None
    if window < T - 1:
        back = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
        mask = (back >= 0) & (back <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


def blocked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Blocks of queries against the keys that they see. On a CPU, compiled, faster than SDPA's own kernel."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    outputs = []
    for start in range(0, q.size(2), 128):
        first, end = max(0, start - window), min(start + 128, q.size(2))
        back = torch.arange(start, end)[:, None] - torch.arange(first, end)
        scores = q[:, :, start:end] @ k[:, :, first:end].mT * q.size(-1) ** -0.5
        scores = scores.masked_fill((back < 0) | (back > window), -torch.inf)
        outputs.append(torch.softmax(scores, dim=-1) @ v[:, :, first:end])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def flex_backend(windows: set[int], T: int, kernel_options: dict | None = None) -> Callable:
    """FlexAttention, which skips what the window hides. Fast when compiled only; masks are built once."""

    def block_mask(window: int):
        return create_block_mask(lambda b, h, q, k: (q >= k) & (q - k <= window), None, None, T, T, DEVICE)

    masks = {window: block_mask(window) for window in windows if window < T - 1}

    def attend(q, k, v, window):
        if window not in masks or q.size(1) != T or not torch.compiler.is_compiling():
            return sdpa_attention(q, k, v, window)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"block_mask": masks[window], "enable_gqa": True, "kernel_options": kernel_options}
        return flex_attention(q, k, v, **options).transpose(1, 2)

    return attend


def fa3_backend() -> Callable:
    """FlashAttention-3, as prepare.py has fetched it."""
    from kernels import get_kernel

    repo, version = prepare.ATTENTION_KERNEL
    if prepare.KERNEL_PATH.exists():  # the path that prepare.py has noted
        os.environ.setdefault("LOCAL_KERNELS", f"{repo}={prepare.KERNEL_PATH.read_text()}")
    flash = get_kernel(repo, version=version)
    flash = getattr(flash, "flash_attn_interface", flash)

    def attend(q, k, v, window):
        return flash.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))

    return attend


def probe_attention(attend: Callable, windows: set[int], T: int, compiled: bool, fullgraph: bool) -> None:
    """Raise whatever goes wrong in a forward and a backward pass, wrong results included."""
    if compiled:
        attend = torch.compile(attend, dynamic=False, fullgraph=fullgraph)
    like = {"device": DEVICE, "dtype": COMPUTE_DTYPE, "requires_grad": True}
    for window in windows:
        qkv = [torch.randn(1, T, n, HEAD_DIM, **like) for n in (N_EMBD // HEAD_DIM, N_KV_HEAD, N_KV_HEAD)]
        outputs = [function(*qkv, window) for function in (attend, sdpa_attention)]
        results = ([y, *torch.autograd.grad(y.square().sum(), qkv)] for y in outputs)
        if not all((a - b).float().norm() < 0.02 * b.float().norm() for a, b in zip(*results, strict=True)):
            raise RuntimeError("its results differ from scaled_dot_product_attention")


def pick_attention(windows: set[int], T: int, compiled: bool) -> tuple[str, Callable]:
    """The fastest backend that works here, and its name; on CUDA it says in a line why another does not."""
    if DEVICE == "cpu" and compiled:
        return "blocked", blocked_attention
    backends = {}
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] in (8, 9):
        backends["fa3"] = fa3_backend
    if DEVICE == "cuda" and compiled and min(windows) < T - 1:
        backends["flex"] = lambda: flex_backend(windows, T)
        # the default needs more shared memory than an RTX 3090 or 4090 has
        backends["flex with two stages"] = lambda: flex_backend(windows, T, {"num_stages": 2})
    for name, backend in backends.items():
        try:
            attend = backend()
            try:
                probe_attention(attend, windows, T, compiled, fullgraph=True)
            except torch._dynamo.exc.Unsupported as error:
                if name != "fa3":  # FlexAttention outside of a graph is slower than any other
                    raise
                probe_attention(attend, windows, T, compiled, fullgraph=False)
                why = prepare.reason(error)
                print(f"attention: {name} breaks the compiled graph in every layer ({why})", flush=True)
            return name, attend
        except Exception as error:  # a missing kernel, a wrong build, a failed launch: the cure is the same
            print(f"attention: {name} cannot be used here ({prepare.reason(error)})", flush=True)
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
        pattern = (self.window_pattern * self.n_layer)[: self.n_layer - 1] + "L"
        return [self.short_window if letter == "S" else self.sequence_len for letter in pattern]

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


def shift(x: torch.Tensor, steps: int = 1) -> torch.Tensor:
    """x (B, T, ...) moved `steps` tokens later, with zeros before it."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (steps, 0))[:, : x.size(1)]


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE (arXiv 2104.09864) on x (B, T, n_head, head_dim); cos and sin are (1, T, 1, head_dim / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (2305.13245) with QK-norm (2010.04245) and value residuals (2410.17897)."""

    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.window, self.attend = config.windows()[layer], attend
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(self.n_head * self.head_dim, config.n_embd)
        n_gates = self.n_kv_head * (2 if BIGRAM_ROWS else 1)
        self.ve_gate = Linear(GATE_CHANNELS, n_gates) if config.has_value_embedding(layer) else None

    def forward(self, x, ve, cos, sin):
        B, T, C = x.size()
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k, previous = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim).chunk(2, dim=-1)
        k = torch.cat([k, shift(previous)], dim=-1)  # so that one layer can find what followed a token before
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None:
            gates = 2 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS])).view(B, T, -1, self.n_kv_head, 1)
            v = v + (gates * ve.view(B, T, -1, self.n_kv_head, self.head_dim)).sum(2)
        q, k = apply_rotary(norm(q), cos, sin), apply_rotary(norm(k), cos, sin)
        y = self.attend(q, k, v, self.window)
        return self.c_proj(y.reshape(B, T, -1))


class Block(nn.Module):
    """Attention, then a ReLU^2 MLP behind a causal convolution (Primer, arXiv 2109.08668), by channel."""

    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, attend)
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x, ve, taps, cos, sin):
        x = x + self.attn(norm(x), ve, cos, sin)
        h = norm(x)
        h = h + sum(tap * shift(h, steps) for steps, tap in enumerate(taps.to(x.dtype), 1))
        return x + self.c_proj(F.relu(self.c_fc(h)).square())


class GPT(nn.Module):
    """model(idx) gives logits (B, T, vocab_size) of idx (B, T); model(idx, targets) gives the mean loss."""

    def __init__(self, config: GPTConfig, attend: Callable = sdpa_attention):
        super().__init__()
        self.config = config
        kv_dim = config.n_embd // config.n_head * config.n_kv_head
        layers = range(config.n_layer)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config, i, attend) for i in layers])
        rows, has_ve = config.vocab_size + BIGRAM_ROWS, config.has_value_embedding
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, kv_dim) for i in layers if has_ve(i)})
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.full((config.n_layer,), X0_INIT))
        self.conv_taps = nn.Parameter(torch.zeros(config.n_layer, CONV_TAPS, config.n_embd))
        half = config.n_embd // config.n_head // 2
        frequency = ROPE_BASE ** -(torch.arange(half) / half)
        angle = torch.outer(torch.arange(config.sequence_len), frequency)[None, :, None, :]
        self.register_buffer("cos", angle.cos().to(COMPUTE_DTYPE), persistent=False)
        self.register_buffer("sin", angle.sin().to(COMPUTE_DTYPE), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Output projections, gates and value embeddings start at zero, so every block is the identity."""
        bound = INIT_SCALE * math.sqrt(3 / self.config.n_embd)  # a standard deviation of n_embd ** -0.5
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for name, weight in self.named_parameters():
            if re.search("c_q|c_k|c_v|c_fc", name):
                nn.init.uniform_(weight, -bound, bound)
            elif re.search("c_proj|gate|value_embeds", name):
                nn.init.zeros_(weight)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        cos, sin = self.cos[:, : idx.size(1)], self.sin[:, : idx.size(1)]
        x = x0 = norm(self.wte(idx).to(COMPUTE_DTYPE))  # (B, T, n_embd)
        ve_idx = idx.unsqueeze(-1)  # (B, T, 1), or 2 with the row of the hashed bigram
        if BIGRAM_ROWS:
            bigram = (shift(idx) * 36313 ^ idx * 27191) % BIGRAM_ROWS
            ve_idx = torch.stack([idx, self.config.vocab_size + bigram], dim=-1)
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](ve_idx).to(x.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, self.conv_taps[i], cos, sin)
        logits = self.lm_head(norm(x).flatten(0, 1)).float()  # flat: fuses with the loss, no float32 copy
        logits = logits * torch.rsqrt(1 + (logits / SOFTCAP).square())  # as tanh does, at a fifth of the cost
        if targets is None:
            return logits.view(*idx.shape, -1)  # (B, T, vocab_size)
        return F.cross_entropy(logits, targets.flatten())

    def param_groups(self) -> list[dict]:
        """Groups for MuonAdamW: the blocks' matrices by shape, and all else for AdamW."""
        lr, head_lr = (rate * (self.config.n_embd / 768) ** -0.5 for rate in (EMBEDDING_LR, UNEMBEDDING_LR))
        shapes = {}
        for matrix in self.blocks.parameters():
            shapes.setdefault(matrix.shape, []).append(matrix)
        return [
            {"params": [self.lm_head.weight], "lr": head_lr},
            {"params": [self.wte.weight], "lr": lr},
            {"params": self.value_embeds.parameters(), "lr": lr, "weight_decay": VE_WEIGHT_DECAY},
            {"params": [self.resid_lambdas], "lr": SCALAR_LR * 0.01},
            {"params": [self.x0_lambdas], "lr": SCALAR_LR, "betas": (0.96, 0.95)},
            {"params": [self.conv_taps], "lr": CONV_LR},
            *({"kind": "muon", "params": params, "lr": MATRIX_LR} for params in shapes.values()),
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
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adamw_update(params, grads, firsts, seconds, lr, decay, beta1, beta2) -> None:
    """AdamW (arXiv 1711.05101) in place; `lr` holds the correction of both moments' bias."""
    for p, g, first, second in zip(params, grads, firsts, seconds, strict=True):
        first.mul_(beta1).add_(g * (1 - beta1))
        second.lerp_(g.square(), 1 - beta2)
        p.mul_(1 - decay).sub_(lr * first / (second.sqrt() + 1e-10))


def muon_update(params, grads, velocity, second, lr, decay, momentum, beta2) -> torch.Tensor:
    """Muon (arXiv 2502.16982) in place, with NorMuon (2510.05491) and cautious decay (2510.12402).

    K matrices (m, n) of one shape, with velocity (K, m, n) and second (K, m, 1) or (K, 1, n). Returns what
    second becomes: changed in place, torch 2.11's C++ backend would read it again where m or n is 2 or 3.
    """
    g = torch.stack(grads)
    velocity.mul_(momentum).add_(g * (1 - momentum))
    g = orthogonalize(g * (1 - momentum) + velocity * momentum).float()  # Nesterov
    # even out the neurons' step sizes by their running mean square; keep each matrix's norm
    square = g.square().mean(-1 if second.size(-1) == 1 else -2, keepdim=True)
    second = second.lerp(square, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    before, after = (x.sum((-2, -1), keepdim=True) for x in (square, square * scale.square()))
    g = g * scale * (before / after.clamp_min(1e-10)).sqrt()
    factor = max(1, g.size(-2) / g.size(-1)) ** 0.5
    # decay only where the step shrinks p too; a GPU needs one or two launches for all K
    steps = [factor * (lr * u + decay * p * (u * p >= 0)) for p, u in zip(params, g.unbind(), strict=True)]
    torch._foreach_sub_(params, steps)
    return second


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon" hold matrices of one shape; groups of kind "adamw" hold anything.

    One compiled graph does all groups. lr, weight_decay and the first beta, Muon's momentum, may change
    at every step: they reach it as 0-D tensors.
    """

    def __init__(self, groups: list[dict], compiled: bool = True):
        super().__init__(groups, {"kind": "adamw", "betas": ADAM_BETAS, "weight_decay": 0.0})
        self.run = torch.compile(self.run, dynamic=False, fullgraph=True) if compiled else self.run

    @staticmethod
    def run(jobs: list[tuple]) -> list[torch.Tensor]:
        """Update all groups. Returns the new second moments of Muon's groups, in their order."""
        seconds = []
        for kind, *arguments in jobs:
            if kind == "muon":
                seconds.append(muon_update(*arguments))
            else:
                adamw_update(*arguments)
        return seconds

    @torch.no_grad()
    def step(self) -> None:
        jobs, muon_states = [], []
        for group in self.param_groups:
            kind, lr, (beta1, beta2) = group["kind"], group["lr"], group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:  # as with CONV_TAPS = 0
                continue
            state = self.state[params[0]]
            if not state:
                state["first"], state["second"] = ([torch.zeros_like(p) for p in params] for _ in range(2))
                if kind == "muon":
                    m, n = params[0].shape
                    state["first"] = torch.stack(state["first"])
                    state["second"] = state["first"].mean(-1 if m >= n else -2, keepdim=True)
            state["step"] = state.get("step", 0) + 1
            if kind == "adamw":  # the moments begin at zero: undo that bias
                lr *= (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
            scalars = torch.tensor([lr, group["lr"] * group["weight_decay"], beta1]).unbind()
            grads = [p.grad for p in params]
            jobs.append((kind, params, grads, state["first"], state["second"], *scalars, beta2))
            if kind == "muon":
                muon_states.append(state)
        for state, second in zip(muon_states, self.run(jobs), strict=True):
            state["second"] = second


def schedule(optimizer: MuonAdamW, step: int, progress: float) -> float:
    """Set rates, decay and momentum for a step. Returns the factor on the learning rates."""
    factor = min(1.0, FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * (1 - progress) / WARMDOWN_RATIO)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        if group["kind"] == "muon":
            momentum = MOMENTUM_START + (MOMENTUM - MOMENTUM_START) * min(1, step / MOMENTUM_STEPS)
            group["betas"] = (momentum, group["betas"][1])
            group["weight_decay"] = WEIGHT_DECAY * (1 - progress)
    return factor


# ---------------------------------------------------------------------------
# Training

# dense bf16 TFLOP/s by part of the GPU's name, from NVIDIA's data sheets
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "GB200": 2500}
PEAK_TFLOPS |= {"B200": 2250, "A100": 312, "L40S": 362, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 209}


def peak_memory_mb() -> float:
    """Peak of the GPU's memory; without CUDA, of the process's."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


EAGER_WARNING = """
WARNING: eager training on a GPU runs at a fraction of the speed, and its val_bpb does not compare with that
of a compiled run. Install a C compiler and Python's header files (gcc and python3-dev), and start again.
"""


def can_compile() -> bool:
    """Whether torch.compile works here; says in one line why not."""
    try:
        if DEVICE == "mps":
            raise RuntimeError("it is not reliable on Apple's MPS")
        torch.compile(lambda x: x + 1)(torch.ones(8, device=DEVICE))
        return True
    except Exception as error:  # no C++ compiler, no Triton, no Python headers: each has a class of its own
        print(f"torch.compile cannot be used ({prepare.reason(error)}); running eagerly", flush=True)
        if DEVICE == "cuda":
            print(EAGER_WARNING, flush=True)
        return False


def train_step(model: nn.Module, optimizer: MuonAdamW, batches: Iterator, accum: int) -> tuple:
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
    accum = grad_accum_steps(B)
    prepare.watch(prepare.STARTUP_SECONDS)  # every attempt gets the full time
    try:
        for _ in range(2):
            train_step(model, optimizer, iter([(*tokens, 1)] * accum), accum)
        prepare.check_model(model, tokenizer, B)
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, saved)
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        torch.manual_seed(SEED)


# what the allocators say, cuBLAS on a full card, and FlashAttention-3, to which torch gives no message
OUT_OF_MEMORY = (
    "out of memory|can't allocate memory|ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|API call failed"
)


def fit_batch(model: nn.Module, optimizer: MuonAdamW, tokenizer: Tokenizer) -> int:
    """Rehearse with DEVICE_BATCH_SIZE rows, and with half as many for as long as memory runs out."""
    B = DEVICE_BATCH_SIZE
    while True:
        try:
            rehearse(model, optimizer, tokenizer, B)
            return B
        except RuntimeError as error:
            if B == 1 or not re.search(OUT_OF_MEMORY, str(error)):
                raise
        B //= 2  # out of the handler, so that what the failed attempt held can be freed
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        print(f"out of memory: device batch halved to {B} rows", flush=True)


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Tokenizer) -> str:
    """A short text from the model, begun at BOS."""
    ids = [tokenizer.get_bos_token_id()]
    for _ in range(64):
        logits = model(torch.tensor([ids], device=DEVICE))[0, -1]
        ids.append(torch.multinomial(torch.softmax(logits.float() / 0.8, dim=-1), 1).item())
    return tokenizer.decode(ids[1:])


def main() -> None:
    """Train, evaluate and print the summary."""
    if SAVE and (os.path.isdir(SAVE) or not os.path.isdir(os.path.dirname(os.path.abspath(SAVE)))):
        stop(f"AUTORESEARCH_SAVE={SAVE} is no file in a folder that exists; make the folder, name a file")
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # the harness wants results that repeat bitwise
    if DEVICE == "cpu" and sys.platform == "linux":
        for option, size in ((-1, 2**31 - 1), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)  # what a step frees waits for the next one
    tokenizer = Tokenizer.from_directory()
    make_dataloader(tokenizer, DEVICE_BATCH_SIZE, MAX_SEQ_LEN, "train")  # bad data shows before compiling

    compiled = can_compile()
    device_name = DEVICE_NAME if compiled else f"{DEVICE_NAME}, eager"
    config = GPTConfig(vocab_size=tokenizer.get_vocab_size())
    attention, attend = pick_attention(set(config.windows()), MAX_SEQ_LEN, compiled)
    with torch.device(DEVICE):  # drawn there: at full 393M numbers that need no copy
        raw_model = GPT(config, attend)
    optimizer = MuonAdamW(raw_model.param_groups(), compiled)
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    print(f"starting on {device_name}, {attention}, {COMPUTE_DTYPE}, {asdict(config)}", flush=True)
    B = fit_batch(model, optimizer, tokenizer)

    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in DEVICE_NAME), None)

    def mfu(tokens: int, seconds: float) -> str:
        tflops = raw_model.flops_per_token() * tokens / seconds / 1e12
        return f"{100 * tflops / peak:.2f}" if peak else "n/a"

    batches = make_dataloader(tokenizer, B, MAX_SEQ_LEN, "train")
    gc.collect()
    gc.freeze()
    gc.disable()  # no collection in the middle of a step
    startup_seconds = time.time() - STARTED
    step, next_log = 0, 0.0
    while clock.progress() < 1:
        factor = schedule(optimizer, step, clock.progress())
        loss, epoch = train_step(model, optimizer, batches, grad_accum_steps(B))
        step += 1
        log = clock.progress() >= next_log
        if (log or step % CHECK_EVERY == 0) and not loss.item() < 3 * math.log(config.vocab_size):  # NaN too
            print(f"FAIL: the loss is {loss:.2f} at step {step}", flush=True)
            sys.exit(1)
        if log:
            next_log += LOG_EVERY
            tokens, seconds = step * TOTAL_BATCH_SIZE, clock.elapsed()
            print(
                f"step {step:05d} | {100 * clock.progress():5.1f}% | loss {loss:.4f} | lr x{factor:.2f} "
                f"| {tokens / seconds:,.0f} tok/s | mfu {mfu(tokens, seconds)} | epoch {epoch}",
                flush=True,
            )
        if DEVICE != "cpu" and clock.progress() > 0.98:
            torch.accelerator.synchronize()  # so that no step is under way when the time is up
    training_seconds = clock.elapsed()
    print("evaluating", flush=True)
    val_bpb = evaluate_bpb(model, tokenizer, B)
    eval_seconds = clock.elapsed() - training_seconds
    try:
        print(f"sample: {sample(raw_model.eval(), tokenizer)!r}")
    except Exception as error:  # a model that scores well but cannot take a short text keeps its score
        print(f"sample: none ({prepare.reason(error)})")
    if epoch > 1:
        print(f"some text was read more than once (epoch {epoch}); with more of it, bigrams overfit less")
    print("---")
    print(f"val_bpb:          {val_bpb:.6f}")
    print(f"training_seconds: {training_seconds:.1f}")
    print(f"total_seconds:    {time.time() - STARTED:.1f}")
    print(f"peak_vram_mb:     {peak_memory_mb():.1f}")
    print(f"mfu_percent:      {mfu(step * TOTAL_BATCH_SIZE, training_seconds)}")
    print(f"total_tokens_M:   {step * TOTAL_BATCH_SIZE / 1e6:.1f}")
    print(f"num_steps:        {step}")
    print(f"num_params_M:     {sum(p.numel() for p in raw_model.parameters()) / 1e6:.1f}")
    print(f"depth:            {config.n_layer}")
    print(f"startup_seconds:  {startup_seconds:.1f}")
    print(f"eval_seconds:     {eval_seconds:.1f}")
    print(f"seed:             {SEED}")
    print(f"device:           {device_name}")
    print(f"attention:        {attention}")
    print(f"source:           {prepare.prepared()[1]['source']}")
    print(f"epochs:           {epoch}")
    print(f"harness:          {prepare.harness_digest(tokenizer)}", flush=True)
    if SAVE:
        try:
            torch.save({"config": asdict(config), "model": raw_model.state_dict()}, SAVE + ".part")
            os.replace(SAVE + ".part", SAVE)
        except (OSError, RuntimeError) as error:
            stop(f"AUTORESEARCH_SAVE={SAVE} could not be written ({prepare.reason(error)})")


if __name__ == "__main__":
    main()
