"""Models that diffusers and transformers save are converted, compute the same here, and go back into them.

Needs the extra `parity`; random models of a tiny size, no downloads.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ditmem_jax.config import build
from ditmem_jax.convert.export import export_folder
from ditmem_jax.convert.folder import convert_checkpoint
from ditmem_jax.convert.kinds import KINDS
from ditmem_jax.convert.names_diffusers import CLIP, renamed
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan import clip
from ditmem_jax.models.wan import vae as vae_module
from ditmem_jax.storage.weights import read_networks
from ditmem_jax.types import Conditioning

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SHAPE = (2, 4, 3, 4, 6)  # latents [B, C, T, H, W]
DIT = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=32, ffn_dim=48, num_layers=3, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
)  # fmt: skip
VAE = dict(base_dim=8, z_dim=4, latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.0, 1.2])
VAE_2_2 = dict(
    decoder_base_dim=16,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
)


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 1 or parameter.shape[1:].numel() == 1:
                parameter.add_(0.5)
    return model.eval()


def converted(model, part, tmp_path, dtype=jnp.float32):
    """The same network here, after a check that its export has exactly the tensors that the model was saved with."""
    model.save_pretrained(tmp_path / "source" / part)
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    check_export(tmp_path, part)
    return loaded(tmp_path / "converted", dtype)


def check_export(tmp_path, part):
    export_folder(tmp_path / "converted", tmp_path / "exported", "diffusers")
    (saved,) = (tmp_path / "source" / part).glob("*.safetensors")
    tensors, exported = (
        safetensors.numpy.load_file(path) for path in (saved, tmp_path / "exported" / part / saved.name)
    )
    assert exported.keys() == tensors.keys()
    for name in tensors:
        assert exported[name].shape == tensors[name].shape
        assert exported[name].tobytes() == tensors[name].tobytes(), name


def loaded(folder, dtype=jnp.float32):
    """The only network in a converted folder."""
    ((kind, values),) = read_networks(folder).items()
    config = build(KINDS[kind].config, values)
    structure, wanted = abstract(lambda: KINDS[kind].module(config, rngs=nnx.Rngs(0), dtype=dtype))
    arrays = safetensors.numpy.load_file(folder / f"{kind}.safetensors")
    return structure.merge({name: jnp.asarray(x, wanted[name].dtype) for name, x in arrays.items()})


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_last(x):
    return jnp.asarray(np.moveaxis(np.asarray(x), 1, -1))


def error(got, expected):
    """Relative to the norm of what is expected."""
    got, expected = (np.asarray(x, np.float32) for x in (got, expected))
    assert got.shape == expected.shape
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def assert_close(got, expected):
    assert error(got, expected) <= 1e-5


def assert_as_close(got, peer, expected):
    """In bfloat16, of 8 bits, the peer itself loses about 0.01; ours was measured to lose 0.8 to 1.1 times as much."""
    assert error(peer, expected) <= 0.02
    assert error(got, expected) <= 1.5 * error(peer, expected)


def in_dtypes(model, forward):
    """Results of `forward` with the weights of the model in bfloat16: computed in bfloat16, and in float32."""
    with torch.no_grad():
        return [forward(model.to(dtype), dtype).float().numpy() for dtype in (torch.bfloat16, torch.float32)]


def transformer(kind):
    """A model of diffusers and what it is fed: its arguments, and ours."""
    image, both = kind in ("i2v", "flf2v"), kind == "flf2v"
    extra = dict(in_channels=8, image_dim=24, added_kv_proj_dim=24) if image else {}
    extra |= dict(pos_embed_seq_len=10) if both else {}
    extra |= dict(in_channels=8) if kind == "i2v without CLIP" else {}
    model = randomised(diffusers.WanTransformer3DModel(**DIT | extra))
    length = 512 if image else 7  # diffusers takes what is beyond 512 rows for the image
    latents, context = random(*SHAPE), random(2, length, 16, seed=1)
    condition, tokens = random(*SHAPE, seed=2), random(2, 5, 24, seed=3)
    timestep = np.array([900.0, 20.0], np.float32)
    if kind == "a timestep per token":
        timestep = np.abs(random(2, 3 * 2 * 3, seed=4)) * 300
    conditioned = image or kind == "i2v without CLIP"
    theirs = (np.concatenate([latents, condition], axis=1) if conditioned else latents, timestep, context)
    theirs = dict(zip(("hidden_states", "timestep", "encoder_hidden_states"), theirs, strict=True))
    given = dict(frames=channels_last(condition)) if conditioned else {}
    if image:
        tokens = random(4, 5, 24, seed=3) if both else tokens  # a picture a row: first, last, first, last
        theirs["encoder_hidden_states_image"] = tokens
        given |= dict(image=jnp.asarray(tokens.reshape(2, -1, 24)))
    return (
        model,
        {name: torch.from_numpy(x) for name, x in theirs.items()},
        dict(
            latents=channels_last(latents),
            timestep=jnp.asarray(timestep),
            conditioning=Conditioning(jnp.asarray(context), **given),
        ),
    )


KINDS_OF_TRANSFORMERS = ["t2v", "i2v", "flf2v", "i2v without CLIP", "a timestep per token"]


@pytest.mark.parametrize("kind", KINDS_OF_TRANSFORMERS)
def test_transformer(tmp_path, kind):
    model, theirs, ours = transformer(kind)
    dit = converted(model, "transformer", tmp_path)
    with torch.no_grad():
        expected = model(**theirs).sample
    with jax.default_matmul_precision("highest"):
        assert_close(dit(**ours), channels_last(expected))


@pytest.mark.parametrize("kind", KINDS_OF_TRANSFORMERS)
def test_transformer_in_bfloat16(tmp_path, kind):
    model, theirs, ours = transformer(kind)
    dit = converted(model.to(torch.bfloat16), "transformer", tmp_path, jnp.bfloat16)

    def forward(model, dtype):
        return model(**{name: x if name == "timestep" else x.to(dtype) for name, x in theirs.items()}).sample

    peer, expected = (channels_last(x) for x in in_dtypes(model, forward))
    assert_as_close(dit(**ours), peer, expected)


@pytest.mark.parametrize("extra", [{}, VAE_2_2], ids=["2.1", "2.2"])
def test_vae(tmp_path, extra):
    model = randomised(diffusers.AutoencoderKLWan(**VAE | extra))
    vae = converted(model, "vae", tmp_path)
    video = np.clip(random(1, 3, 9, 32, 32), -1, 1)
    with torch.no_grad():
        moments = model.encode(torch.from_numpy(video)).latent_dist.mode()
        pixels = model.decode(moments).sample
    with jax.default_matmul_precision("highest"):
        latents = vae.normalise(channels_last(moments))
        assert_close(vae_module.encode(vae, channels_last(video)), latents)
        assert_close(jnp.clip(vae_module.decode(vae, latents), -1, 1), channels_last(pixels))


def text_encoder():
    """A model of transformers, and the ids and mask that it is fed."""
    config = transformers.UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
    ids = np.random.default_rng(0).integers(64, size=(2, 9))
    mask = np.arange(9)[None] < np.array([[9], [5]])

    def forward(model, dtype):
        rows = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
        return rows.last_hidden_state * torch.from_numpy(mask)[..., None]

    model = randomised(transformers.UMT5EncoderModel(config))
    return model, forward, (jnp.asarray(ids, jnp.int32), jnp.asarray(mask))


def test_text_encoder(tmp_path):
    model, forward, given = text_encoder()
    text = converted(model, "text_encoder", tmp_path)
    with torch.no_grad():
        expected = forward(model, torch.float32)
    with jax.default_matmul_precision("highest"):
        assert_close(text(*given), expected)


def test_text_encoder_in_bfloat16(tmp_path):
    model, forward, given = text_encoder()
    text = converted(model.to(torch.bfloat16), "text_encoder", tmp_path, jnp.bfloat16)
    peer, expected = in_dtypes(model, forward)
    assert_as_close(text(*given), peer, expected)


def image_encoder():
    """A model of transformers, and the picture in [-1, 1] that it is fed."""
    config = transformers.CLIPVisionConfig(
        hidden_size=160, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28,
        patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    pixels = np.clip(random(2, 28, 28, 3), -1, 1)
    normal = ((pixels + 1) / 2 - np.float32(clip.MEAN)) / np.float32(clip.STD)

    def forward(model, dtype):
        given = torch.from_numpy(np.moveaxis(normal, -1, 1)).to(dtype)
        return model(given, output_hidden_states=True).hidden_states[-2]

    return randomised(transformers.CLIPVisionModel(config)), forward, jnp.asarray(pixels)


def original_clip(model):
    """The tensors of a model of transformers as Wan's own file has them, beside others of that file."""
    found, fused = (
        {"textual.head.0.weight": np.zeros((2, 2), np.float32), "log_scale": np.float32(1)[None]},
        {},
    )
    for name, x in model.state_dict().items():
        name, x = renamed([(b, a) for a, b in CLIP], name.removeprefix("vision_model.")), x.numpy()
        stem, attention, leaf = name.rpartition(".attn.")
        if attention and leaf[0] in "qkv":
            fused.setdefault(f"{stem}.attn.to_qkv.{leaf[2:]}", {})[leaf[0]] = x
        else:
            found[name] = x[None, None] if "cls" in name else x[None] if "pos" in name else x
    found |= {name: np.concatenate([parts[p] for p in "qkv"]) for name, parts in fused.items()}
    return found | {"visual.head": np.zeros((160, 8), np.float32)}


@pytest.mark.parametrize("layout", ["transformers", "transformers before 5", "original"])
def test_image_encoder(tmp_path, layout):
    model, forward, pixels = image_encoder()
    folder = tmp_path / "source" / ("." if layout == "original" else "image_encoder")
    model.save_pretrained(folder)
    if layout != "transformers":
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        tensors = {f"vision_model.{name}": x for name, x in tensors.items()}
        if layout == "original":
            tensors = original_clip(model)
            (folder / "config.json").unlink()
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    with torch.no_grad():
        expected = forward(model, torch.float32)
    with jax.default_matmul_precision("highest"):
        assert_close(loaded(tmp_path / "converted")(pixels), expected)


def test_image_encoder_in_bfloat16(tmp_path):
    model, forward, pixels = image_encoder()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source" / "image_encoder")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    peer, expected = in_dtypes(model, forward)
    assert_as_close(loaded(tmp_path / "converted", jnp.bfloat16)(pixels), peer, expected)
