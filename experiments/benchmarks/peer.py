"""The alternative of a user: diffusers' Wan transformer in PyTorch with the memory of DiT-Mem, as released.

The memory is encoded to all of its nominal rows, 100 per video and band, and every block carries them through its
self-attention as rows beside the video's: they query, too, and what they find is dropped. Tensor names are the
released ones, so that one set of weights serves both sides.
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn
from torch.nn import functional as F

from ditmem_jax.config import DiTConfig, MemoryConfig
from experiments.benchmarks.case import Case


class Filter(nn.Module):
    def __init__(self, channels: int, grid: tuple[int, int, int], dropout: float):
        super().__init__()
        bins = (*grid[:2], grid[2] // 2 + 1)
        self.register_buffer("complex_weight", torch.rand(channels, *bins, 2))
        self.norm, self.dropout = nn.BatchNorm3d(channels), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        axes = (2, 3, 4)
        spectrum = torch.fft.rfftn(x.float(), dim=axes, norm="ortho") * torch.view_as_complex(
            self.complex_weight.float()
        )
        y = torch.fft.irfftn(spectrum, s=x.shape[2:], dim=axes, norm="ortho")
        return self.norm(x + self.dropout(y.to(x.dtype)))


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, stage: tuple[int, int, int, int], grid, dropout: float):
        super().__init__()
        channels, kernel, stride, self.pool = stage
        self.conv = nn.Conv3d(inputs, channels, kernel, stride, kernel // 2)
        self.fft_filter = Filter(channels, grid, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(F.relu(self.fft_filter(self.conv(x))), self.pool)


class Branch(nn.Module):
    def __init__(self, config: MemoryConfig):
        super().__init__()
        grid, inputs = config.latent_grid, config.in_dim
        for number, stage in enumerate(config.stages, start=1):
            channels, kernel, stride, pool = stage
            grid = tuple((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in grid)
            setattr(self, f"conv_block{number}", ConvBlock(inputs, stage, grid, config.dropout))
            grid, inputs = tuple(n // pool for n in grid), channels
        self.feature_proj = nn.Linear(inputs * grid[1] * grid[2], config.dim)
        self.depth, self.tokens = len(config.stages), config.tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(1, self.depth + 1):
            x = getattr(self, f"conv_block{number}")(x)
        x = x.transpose(1, 2).flatten(2)
        return self.feature_proj(F.adaptive_avg_pool1d(x.transpose(1, 2), self.tokens).transpose(1, 2))


class SelfAttention(nn.Module):
    def __init__(self, config: MemoryConfig):
        super().__init__()
        for name in "qkvo":
            setattr(self, name, nn.Linear(config.dim, config.dim))
        self.norm_q, self.norm_k = (nn.RMSNorm(config.dim, eps=config.eps) for _ in "qk")
        self.heads = config.num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        heads = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (query, key, value))
        return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Latents [B, R, C, T, H, W] to memory rows [B, 2 R P, D]."""

    def __init__(self, config: MemoryConfig):
        super().__init__()
        self.high_pass_module, self.low_pass_module = Branch(config), Branch(config)
        self.self_attention = SelfAttention(config)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        videos, batch = latents.flatten(0, 1), len(latents)
        bands = (branch(videos) for branch in (self.high_pass_module, self.low_pass_module))
        rows = (band.unflatten(0, (batch, -1)).flatten(1, 2) for band in bands)
        return torch.cat([self.self_attention(band) for band in rows], dim=1)


class Block(WanTransformerBlock):
    """diffusers' block, in whose self-attention the rows of a memory [B, M, D] stand beside the video's."""

    memory: torch.Tensor | None = None

    def forward(self, x, context, time, rotary) -> torch.Tensor:
        parts = (self.scale_shift_table + time.float()).chunk(6, dim=1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        rows, length = x, x.shape[1]
        if self.memory is not None:
            rows = torch.cat([x, self.memory.to(x.dtype)], dim=1)
            turns = zip(rotary, (1.0, 0.0), strict=True)  # cos and sin of no rotation
            rotary = [
                F.pad(part, (0, 0, 0, 0, 0, rows.shape[1] - length), value=value) for part, value in turns
            ]
        rows = (self.norm1(rows.float()) * (1 + scale) + shift).type_as(x)
        attended = self.attn1(rows, None, None, rotary)[:, :length]
        x = (x.float() + attended * gate).type_as(x)
        x = x + self.attn2(self.norm2(x.float()).type_as(x), context, None, None)
        rows = (self.norm3(x.float()) * (1 + ffn_scale) + ffn_shift).type_as(x)
        return (x.float() + self.ffn(rows).float() * ffn_gate).type_as(x)


class Transformer(nn.Module):
    """diffusers' transformer, frozen, with such blocks."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.dit = WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
        ).requires_grad_(False)
        for block in self.dit.blocks:
            block.__class__ = Block

    def forward(self, latents, timestep, context, memory=None) -> torch.Tensor:
        """Velocity; shapes as diffusers has them, memory rows [B, M, D]."""
        for block in self.dit.blocks:
            block.memory = memory
        return self.dit(latents, timestep, context, return_dict=False)[0]


# --- operations -------------------------------------------------------------------------------------------------


def prepare(operation: str, case: Case, compiled: bool = False) -> Callable[[], None]:
    """As `ours.prepare`; `compiled` hands the blocks of the transformer to torch.compile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config, dtype = case.config(), getattr(torch, case.dtype)

    def made(kind: Callable[..., nn.Module], *args) -> nn.Module:
        with torch.device(device):
            module = kind(*args).to(dtype)
        if compiled and isinstance(module, Transformer):
            # Block by block, as diffusers advises; not the encoder, whose complex numbers the compiler does not take.
            for block in module.dit.blocks:
                block.compile()
        return module

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def finish(value):
        if device == "cuda":
            torch.cuda.synchronize()
        return value

    z_dim, dit = config.vae.z_dim, config.dit
    if operation == "matmul":
        a, b = (random(case.matmul, case.matmul) for _ in range(2))
        return lambda: finish(a @ b)
    if operation.startswith("vae"):
        vae = made(AutoencoderKLWan).requires_grad_(False).eval()
        if operation == "vae encode":
            pixels = random(1, 3, config.video.frames, config.video.height, config.video.width)
            return lambda: finish(vae.encode(pixels).latent_dist.mode())
        latents = random(1, z_dim, *case.grid)
        return lambda: finish(vae.decode(latents).sample)

    encoder = made(Encoder, config.memory)
    references = random(1, case.videos, z_dim, *case.references)
    if operation == "encoder":
        encoder.eval().requires_grad_(False)
        return lambda: finish(encoder(references))
    transformer = made(Transformer, dit)
    latents = random(1, z_dim, *case.grid)
    if operation == "train":
        context = random(1, dit.text_len, dit.text_dim)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, weight_decay=0.0)
        if case.remat == "blocks":
            transformer.dit.enable_gradient_checkpointing()

        def step():
            noise, sigma = torch.randn_like(latents), 0.7
            noisy = (1 - sigma) * latents + sigma * noise
            timestep = torch.full((1,), 1000 * sigma, device=device)
            velocity = transformer(noisy, timestep, context, encoder(references))
            (velocity - (noise - latents)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            finish(None)

        return step

    contexts, memory = [random(1, dit.text_len, dit.text_dim) for _ in range(2)], None
    with torch.no_grad():
        if operation == "denoise":
            memory = encoder.eval()(references)
        timestep = torch.full((1,), 800.0, device=device)

    @torch.no_grad()
    def denoise():
        toward, away = (transformer(latents, timestep, context, memory) for context in contexts)
        return finish(latents - 0.02 * (away + config.sample.guidance * (toward - away)))

    return denoise
