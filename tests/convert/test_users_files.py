"""Files in the spellings, containers and formats that users have."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ditmem_jax.config import DiTConfig, to_dict
from ditmem_jax.config.presets import DIT_PRESETS
from ditmem_jax.convert import dit, experts, lora
from ditmem_jax.convert.dequantise import dequantised
from ditmem_jax.convert.engine import compact
from ditmem_jax.convert.export import export_file, export_folder
from ditmem_jax.convert.folder import convert_checkpoint
from ditmem_jax.convert.names_diffusers import DIT, renamed
from ditmem_jax.convert.original import original
from ditmem_jax.convert.plan import Options, left_out, plan
from ditmem_jax.convert.sources import Part, open_source
from ditmem_jax.errors import UserError
from ditmem_jax.models.state import abstract
from ditmem_jax.models.wan.dit import DiT
from ditmem_jax.storage.encoders import encoder_metadata
from ditmem_jax.storage.weights import check_weights, read_index, read_networks
from tests.tiny import random_arrays, replace, tiny_config

CONFIG = DiTConfig(dim=32, ffn_dim=64, num_heads=1, num_layers=2, in_dim=4, out_dim=4, text_dim=8, freq_dim=8)


@pytest.fixture(scope="module")
def tensors():
    arrays = random_arrays(abstract(lambda: DiT(CONFIG, rngs=nnx.Rngs(0)))[1])
    return original(dit.table(CONFIG), arrays)


def save(path: Path, tensors, metadata=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, metadata
    )
    return path


def converted(source: Path, role="dit", **options) -> dict[str, np.ndarray]:
    """Tensors of a transformer in original names, after a conversion."""
    target = source.parent / "converted"
    convert_checkpoint(source, target, Options(**options))
    assert read_networks(target)[role] == to_dict(CONFIG)
    arrays = safetensors.numpy.load_file(target / f"{role}.safetensors")
    return original(dit.table(CONFIG), arrays)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), x.astype(np.float32), err_msg=name)


def only(folder: Path, **options):
    (network,) = plan(open_source(folder), Options(**options))
    return network


# --- experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16", "high"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ", "high"),
        ("Wan2.2-I2V-A14B-LowNoise-Q4_K_M", "low"),
        ("wan22-low", "low"),
        ("wan2.1_high_res_style", None),
        ("lowvram_high-quality", None),
        ("highlights", None),
        ("from_high_noise_to_low_noise", None),
    ],
)
def test_experts_by_name(name, expert):
    assert experts.by_name(name) == expert


def part(path, pipeline=None) -> Part:
    return Part((Path(path),), {}, {}, pipeline or {})


@pytest.mark.parametrize(
    ("path", "preset", "pipeline", "name"),
    [
        ("x/model_high_noise.safetensors", "wan2.2-t2v-a14b", {}, "dit_high"),
        ("high_noise_model/model.safetensors", "wan2.2-t2v-a14b", {}, "dit_high"),
        ("transformer/a.safetensors", "wan2.2-t2v-a14b", {"boundary_ratio": 0.875}, "dit_high"),
        ("transformer/a.safetensors", "wan2.1-t2v-14b", {"boundary_ratio": None}, "dit"),
        ("transformer_2/a.safetensors", "wan2.2-t2v-a14b", {}, "dit"),
        ("x/wan2.1_t2v_14B_fp16.safetensors", "wan2.1-t2v-14b", {}, "dit"),
        ("x/model.safetensors", "wan2.1-t2v-1.3b", {}, "dit"),
        ("x/model.safetensors", "wan2.2-t2v-a14b", {}, None),
        ("x/model.safetensors", "wan2.2-i2v-a14b", {}, None),
        ("x/wan2.2_t2v_14B_fp16.safetensors", "wan2.2-t2v-a14b", {}, None),
    ],
)
def test_of_two_experts_nothing_is_guessed(path, preset, pipeline, name):
    config = DIT_PRESETS[preset]
    if name:
        assert experts.network_name(part(path, pipeline), config) == name
        return
    with pytest.raises(UserError, match=r"--role=high, or --role=low, or --role=single"):
        experts.network_name(part(path, pipeline), config)
    assert experts.network_name(part(path), config, "high") == "dit_high"
    assert experts.network_name(part(path), config, "single") == "dit"


def test_an_original_folder_of_one_transformer_is_no_question(tmp_path):
    (tmp_path / "Wan2.1_VAE.pth").touch()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert experts.network_name(part(file), DIT_PRESETS["wan2.1-t2v-14b"]) == "dit"


def test_a_role_is_for_one_transformer(tensors, tmp_path):
    for name in ("a_high_noise", "b_low_noise"):
        save(tmp_path / f"{name}.safetensors", tensors)
    assert {network.role for network in plan(open_source(tmp_path))} == {"dit_high", "dit"}
    with pytest.raises(
        UserError, match=r"--role=high is for one transformer(.|\n)*ditmem convert .*a_high_noise"
    ):
        plan(open_source(tmp_path), Options(role="high"))
    assert only(tmp_path / "b_low_noise.safetensors", role="high").role == "dit_high"


# --- prefixes, wrappers, layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelled",
    [
        lambda name: f"model.diffusion_model.{name}",
        lambda name: f"diffusion_model.{name}",
        lambda name: f"pipe.dit.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"state_dict.model.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
        lambda name: f"module.{name}".replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
        lambda name: f"transformer.{renamed(DIT, name)}",
    ],
)
def test_whatever_stands_before_names(tensors, tmp_path, spelled):
    file = save(tmp_path / "x.safetensors", {spelled(name): x for name, x in tensors.items()})
    assert_same(converted(file), tensors)


def test_averaged_weights_go_before_others(tensors, tmp_path):
    other = {name: x + 1 for name, x in tensors.items()}
    both = {f"generator.model.{name}": x for name, x in tensors.items()}
    file = save(
        tmp_path / "x.safetensors", both | {f"generator_ema.model.{name}": x for name, x in other.items()}
    )
    network = only(file)
    assert network.part.prefix == "generator_ema.model." and "--noema" in network.notes[0]
    assert only(file, ema=False).part.prefix == "generator.model."
    assert only(file, prefix="generator.model").part.prefix == "generator.model."
    assert_same(converted(file), other)
    with pytest.raises(UserError, match="holds no averaged weights"):
        plan(open_source(save(tmp_path / "y.safetensors", tensors)), Options(ema=True))


def test_several_networks_of_a_kind_are_a_question(tensors, tmp_path):
    two = {f"{place}.{name}": x for place in ("generator", "critic") for name, x in tensors.items()}
    file = save(tmp_path / "x.safetensors", two)
    with pytest.raises(UserError, match=r"holds 2 networks of the kind dit(.|\n)*--prefix=critic\."):
        plan(open_source(file))
    assert_same(converted(file, prefix="critic."), tensors)


def test_what_is_left_out_is_told_with_the_reason(tensors, tmp_path):
    more = {"optimizer.state.blocks.0.self_attn.q.weight.exp_avg": np.ones(3, np.float32), "note": np.ones(1)}
    prefixed = {f"model.{name}": x for name, x in tensors.items()}
    save(tmp_path / "model.safetensors", prefixed | more)
    save(tmp_path / "taew2_1.safetensors", {"decoder.1.conv.0.weight": np.ones((2, 2), np.float32)})
    (tmp_path / "optimizer.bin").write_bytes(b"not read")
    source = open_source(tmp_path)
    lines = "\n".join(left_out(source, plan(source)))
    for told in ("optimizer.bin: the state of a training", "exp_avg: the state of a training", "note: of no network",
                 "tiny autoencoder"):  # fmt: skip
        assert told in lines


@pytest.mark.parametrize("folder", ["split_files/diffusion_models", "models/unet", "HighNoise"])
def test_trees_of_other_programs(tensors, tmp_path, folder):
    save(tmp_path / folder / "x.safetensors", tensors)
    assert only(tmp_path).role == ("dit_high" if folder == "HighNoise" else "dit")


def test_the_cache_of_the_hub(tensors, tmp_path):
    repository = tmp_path / "models--Wan-AI--Wan2.1"
    for revision in ("aaa", "bbb"):
        save(repository / "snapshots" / revision / "transformer" / "x.safetensors", tensors)
    (repository / "blobs").mkdir()
    with pytest.raises(UserError, match=r"several revisions(.|\n)*ditmem convert .*snapshots/aaa DEST"):
        open_source(repository)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    for root in (tmp_path, repository):
        assert "snapshots/bbb" in str(only(root).part)
    save(tmp_path / "models--other" / "x.safetensors", tensors)
    with pytest.raises(UserError, match="a cache of 2 repositories"):
        open_source(tmp_path)


def test_variants_are_a_question(tensors, tmp_path):
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save(tmp_path / name, tensors)
    with pytest.raises(
        UserError, match=r"2 variants(.|\n)*ditmem convert .*model\.fp16\.safetensors DEST or "
    ):
        open_source(tmp_path)
    assert only(tmp_path / "model.fp16.safetensors").role == "dit"


def test_a_shard_or_a_folder_above_names_the_folder_to_give(tensors, tmp_path):
    file = save(tmp_path / "runs" / "step-100" / "model-00001-of-00002.safetensors", tensors)
    with pytest.raises(UserError, match=rf"one of 2 shards(.|\n)*ditmem convert {file.parent} DEST"):
        open_source(file)
    with pytest.raises(UserError, match=rf"no weights in(.|\n)*ditmem convert {file.parent} DEST"):
        open_source(tmp_path)


# --- adapters ---------------------------------------------------------------------------------------------------

MODULES = [
    f"blocks.{i}.{part}" for i in range(2) for part in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
]
SPELLINGS = {
    "peft": lambda name: (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"),
    "diffsynth": lambda name: (f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"),
    "comfyui": lambda name: (
        f"diffusion_model.{name}.lora_down.weight",
        f"diffusion_model.{name}.lora_up.weight",
    ),
    "kohya": lambda name: tuple(
        f"lora_unet_{name.replace('.', '_')}.lora_{x}.weight" for x in ("down", "up")
    ),
    "diffusers": lambda name: tuple(f"transformer.{renamed(DIT, name)}.lora_{x}.weight" for x in "AB"),
}


def adapter(tensors, spelling="peft", alpha=None, dtype=np.float32):
    """Tensors of a LoRA of rank 3, and the weights that a merge at strength 1 gives."""
    rng, found, expected = np.random.default_rng(5), {}, dict(tensors)
    for module in MODULES:
        weight = tensors[f"{module}.weight"]
        down = rng.standard_normal((3, weight.shape[1])).astype(dtype)
        up = rng.standard_normal((weight.shape[0], 3)).astype(dtype)
        names = SPELLINGS[spelling](module)
        found |= dict(zip(names, (down, up), strict=True))
        if alpha is not None:
            found[names[0].split(".lora_")[0] + ".alpha"] = np.float32(alpha)
        scale = 1 if alpha is None else alpha / 3
        product = up.astype(np.float64) @ down.astype(np.float64)
        expected[f"{module}.weight"] = (weight.astype(np.float64) + scale * product).astype(np.float32)
    return found, expected


def assert_near(found, expected, tolerance=1e-6):
    for name, x in expected.items():
        np.testing.assert_allclose(
            found[name].astype(np.float32), x, rtol=tolerance, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_adapters_merge_in_every_spelling(tensors, tmp_path, spelling, alpha):
    base = save(tmp_path / "base" / "x.safetensors", tensors)
    found, expected = adapter(tensors, spelling, alpha)
    file = save(tmp_path / "style.safetensors", found)
    assert_near(converted(base, loras=(str(file),)), expected)
    (told,) = read_index(tmp_path / "base" / "converted")["provenance"]["dit"]["loras"]
    assert (told["name"], told["strength"]) == ("style.safetensors", 1.0) and len(told["sha256"]) == 64


def test_differences_biases_and_strength(tensors, tmp_path):
    base = save(tmp_path / "base" / "x.safetensors", tensors)
    rng, prefix = np.random.default_rng(0), "diffusion_model."
    whole = {"blocks.0.norm3.weight": ".diff", "blocks.0.self_attn.q.bias": ".diff_b", "blocks.1.modulation": ".diff_m",
             "head.modulation": ".diff_m", "patch_embedding.weight": ".diff"}  # fmt: skip
    differences = {name: rng.standard_normal(tensors[name].shape).astype(np.float32) for name in whole}
    found = {f"{prefix}{name.rpartition('.')[0]}{end}": differences[name] for name, end in whole.items()}
    file = save(tmp_path / "x.safetensors", found)
    expected = {name: tensors[name] + 0.5 * x for name, x in differences.items()}
    assert_near(converted(base, loras=(f"{file}:0.5",)), {**tensors, **expected})


def test_alpha_of_peft_stands_beside(tensors, tmp_path):
    found, _ = adapter(tensors)
    folder = tmp_path / "adapter"
    save(folder / "adapter_model.safetensors", found)
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 3, "lora_alpha": 6, "alpha_pattern": {"ffn.0": 1.5}})
    )
    opened = lora.open_adapter(folder)
    assert opened.alphas.scale("base_model.model.blocks.0.self_attn.q", 3) == 2
    assert opened.alphas.scale("base_model.model.blocks.0.ffn.0", 3) == 0.5
    base = save(tmp_path / "base" / "x.safetensors", tensors)
    merged = converted(base, loras=(str(folder),))
    product = found["base_model.model.blocks.0.self_attn.q.lora_B.weight"] @ found["base_model.model.blocks.0.self_attn.q.lora_A.weight"]  # fmt: skip
    name = "blocks.0.self_attn.q.weight"
    np.testing.assert_allclose(merged[name], tensors[name] + 2 * product, rtol=1e-6, atol=1e-6)


def test_a_bfloat16_base_is_rounded_once(tensors, tmp_path):
    half = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    base = save(tmp_path / "base" / "x.safetensors", half)
    found, expected = adapter({name: x.astype(np.float32) for name, x in half.items()})
    file = save(tmp_path / "x.safetensors", found)
    merged = converted(
        base, loras=(str(file), f"{file}:-1")
    )  # there and back is exact, since sums are float32
    assert_near(merged, {name: x.astype(np.float32) for name, x in half.items()})
    assert merged["blocks.0.ffn.0.weight"].dtype == jnp.bfloat16
    other = save(tmp_path / "other" / "x.safetensors", half)
    assert_near(converted(other, loras=(str(file),), dtype="float32"), expected)


def test_targets_that_match_nothing_are_listed(tensors, tmp_path):
    base = save(tmp_path / "base.safetensors", tensors)
    found, _ = adapter(tensors)
    more = {f"blocks.{i}.cross_attn.k_img.lora_{x}.weight": np.ones(shape, np.float32)
            for i in range(2) for x, shape in (("A", (3, 32)), ("B", (32, 3)))}  # fmt: skip
    notes = only(base, loras=(str(save(tmp_path / "x.safetensors", found | more)),)).notes
    assert any("nothing here matches blocks.{0-1}.cross_attn.k_img" in note for note in notes)
    with pytest.raises(UserError, match="is a module of this transformer"):
        only(base, loras=(str(save(tmp_path / "y.safetensors", more)),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x | {"blocks.0.ffn.0.dora_scale": np.ones(3, np.float32)},
            "is a DoRA, which is not merged here",
        ),
        (lambda x: x | {"blocks.0.ffn.0.hada_w1_a": np.ones(3, np.float32)}, "is a LoHa"),
        (
            lambda x: {n: v for n, v in x.items() if "0.ffn.0.lora_B" not in n},
            "blocks.0.ffn.0: down without up",
        ),
        (
            lambda x: {n: v[:, :5] if "ffn.2.lora_A" in n else v for n, v in x.items()},
            "does not fit this transformer",
        ),
        (lambda x: {"blocks.0.ffn.0.weight": np.ones((2, 2), np.float32)}, "is no LoRA"),
    ],
)
def test_adapters_that_cannot_be_merged(tensors, tmp_path, change, message):
    base = save(tmp_path / "base.safetensors", tensors)
    file = save(tmp_path / "x.safetensors", change(adapter(tensors)[0]))
    with pytest.raises(UserError, match=message):
        only(base, loras=(str(file),))


def test_an_adapter_is_no_model(tensors, tmp_path):
    file = save(tmp_path / "style.safetensors", adapter(tensors, "comfyui")[0])
    with pytest.raises(UserError, match=rf"LoRA of rank 3(.|\n)*ditmem convert BASE DEST --lora {file}$"):
        plan(open_source(file))
    save(tmp_path / "model.safetensors", tensors)
    source = open_source(tmp_path)
    (network,) = plan(source)
    (line,) = left_out(source, [network])
    assert "LoRA of rank 3" in line and f"--lora {file}" in line


def test_adapters_of_two_experts(tensors, tmp_path):
    for name in ("high", "low"):
        save(tmp_path / "base" / f"{name}_noise.safetensors", tensors)
    found, _ = adapter(tensors)
    plain, high = (
        str(save(tmp_path / f"{name}.safetensors", found)) for name in ("style", "style_HIGH_4steps")
    )
    source = open_source(tmp_path / "base")

    def changed(*loras):
        return {network.role for network in plan(source, Options(loras=loras)) if network.merged}

    assert changed(high) == {"dit_high"} and changed(f"{plain}:1:low") == {"dit"}
    assert changed(f"{plain}:0.5:both") == {"dit", "dit_high"}
    with pytest.raises(UserError, match=r"its name does not tell(.|\n)*:high, or :low, or :both"):
        changed(plain)
    with pytest.raises(UserError, match="no such file"):
        changed(f"{plain}x:1")
    with pytest.raises(UserError, match="FILE\\[:strength\\[:role\\]\\]"):
        changed(f"{plain}:strong")
    (network,) = (network for network in plan(source, Options(loras=(high,))) if network.merged)
    assert "--config.sample.steps=4" in network.merged[0][1] and "guidance_high=1.0" in network.merged[0][1]


# --- quantised --------------------------------------------------------------------------------------------------


def in_float8(tensors, factor_shape, end="scale_weight"):
    """Tensors with matrices of blocks in float8 and factors beside them, and what they mean."""
    found, meaning = {}, {}
    for name, x in tensors.items():
        if not (x.ndim == 2 and name.startswith("blocks.")):
            found[name] = meaning[name] = x
            continue
        shape = factor_shape(x.shape)
        factor = np.random.default_rng(0).uniform(0.5, 2, shape).astype(np.float32)
        found[name] = (x * 8).astype(ml_dtypes.float8_e4m3fn)
        found[f"{name.removesuffix('.weight')}.{end}"] = factor
        laid = factor if factor.size == 1 else factor.reshape(len(x), 1) if factor.size == len(x) else np.kron(
            factor, np.ones((x.shape[0] // shape[0], x.shape[1] // shape[1]), np.float32)
        )  # fmt: skip
        meaning[name] = found[name].astype(np.float32) * laid
    return found, meaning


@pytest.mark.parametrize(
    ("end", "factor_shape"),
    [
        ("scale_weight", lambda shape: ()),
        ("weight_scale", lambda shape: (1,)),
        ("weight_scale", lambda shape: (shape[0],)),
        ("weight_scale", lambda shape: (shape[0], 1)),
        ("weight_scale_inv", lambda shape: (shape[0] // 16, shape[1] // 16)),
    ],
)
def test_float8_with_factors(tensors, tmp_path, end, factor_shape):
    found, meaning = in_float8(tensors, factor_shape, end)
    mark = {
        "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn),
        "blocks.0.ffn.0.scale_input": np.ones((), np.float32),
    }
    file = save(tmp_path / "x.safetensors", found | mark)
    assert any("20 tensors of float8_e4m3fn with factors" in note for note in only(file).notes)
    assert_same(converted(file), meaning)


def test_a_lora_onto_float8_is_added_in_float32(tensors, tmp_path):
    found, meaning = in_float8(tensors, lambda shape: ())
    file = save(tmp_path / "base" / "x.safetensors", found)
    change, expected = adapter(meaning)
    assert_near(converted(file, loras=(str(save(tmp_path / "x.safetensors", change)),)), expected)


def test_plain_float8_is_bfloat16(tensors, tmp_path):
    found = {name: x.astype(ml_dtypes.float8_e5m2) if x.ndim == 2 else x for name, x in tensors.items()}
    result = converted(save(tmp_path / "x.safetensors", found))
    assert result["blocks.0.ffn.0.weight"].dtype == jnp.bfloat16
    assert_same(result, {name: x.astype(np.float32) for name, x in found.items()})


def test_weights_are_never_taken_without_their_factor(tensors):
    found, _ = in_float8(tensors, lambda shape: ())
    from ditmem_jax.storage.tensors import Stored

    def stored(tensors):
        names = {
            np.dtype(np.float32): "F32",
            np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
            np.dtype(np.uint8): "U8",
        }
        return {name: Stored(x.shape, names[x.dtype], x.nbytes, lambda x=x: x) for name, x in tensors.items()}

    assert dequantised(stored(found))[1] == []
    without = {name: x for name, x in found.items() if name != "blocks.1.ffn.0.scale_weight"}
    assert dequantised(stored(without))[1] == [
        "blocks.1.ffn.0.weight is in 8 bits and has no factor beside it"
    ]
    wrong = found | {"blocks.1.ffn.0.scale_weight": np.ones(7, np.float32)}
    assert "does not fit blocks.1.ffn.0.weight" in dequantised(stored(wrong))[1][0]
    marked = found | {"blocks.1.ffn.0.comfy_quant": np.frombuffer(b'{"format": "mxfp8"}', np.uint8)}
    assert "format that is unknown here" in dequantised(stored(marked))[1][0]
    four = found | {"blocks.1.ffn.0.weight.absmax": np.ones(3, np.float32)}
    assert "4 bits of bitsandbytes" in dequantised(stored(four))[1][0]


def test_rounding_is_measured(tensors, tmp_path):
    converted(save(tmp_path / "x.safetensors", tensors), dtype="bfloat16")
    rounding = read_index(tmp_path / "converted")["provenance"]["dit"]["rounding"]
    near = {name: x.astype(jnp.bfloat16).astype(np.float32) for name, x in tensors.items()}
    lost = sum(float(((near[name] - x) ** 2).sum()) for name, x in tensors.items())
    whole = sum(float((x**2).sum()) for x in tensors.values())
    assert rounding == pytest.approx((lost / whole) ** 0.5, rel=1e-3)


def gguf_file(gguf, path, tensors, kind):
    """A file with every matrix whose rows fit in this format."""
    writer = gguf.GGUFWriter(path, "wan")
    type = gguf.GGMLQuantizationType[kind]
    meaning = {}
    block, size = gguf.GGML_QUANT_SIZES[type]
    for name, x in tensors.items():
        if x.ndim == 2 and x.shape[1] % block == 0:
            if kind in (
                "Q4_K",
                "Q6_K",
            ):  # that the library only reads: random bits, with factors that are finite
                rows = np.random.default_rng(len(name)).integers(
                    256, size=(len(x), x.shape[1] // block * size), dtype=np.uint8
                )
                scales = slice(0, 4) if kind == "Q4_K" else slice(208, 210)
                rows.reshape(-1, size)[:, scales] = np.tile(np.float16([0.01]).view(np.uint8), 2)[
                    : scales.stop - scales.start
                ]
            else:
                rows = gguf.quants.quantize(x, type)
            writer.add_tensor(name, rows, raw_dtype=type)
            meaning[name] = gguf.quants.dequantize(rows, type)
        elif x.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", x.shape)
            writer.add_tensor(name, x.reshape(x.shape[0], -1))
            meaning[name] = x
        else:
            writer.add_tensor(name, x)
            meaning[name] = x
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_K", "Q6_K"])
def test_gguf(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    config = DiTConfig(
        dim=32, ffn_dim=256, num_heads=1, num_layers=1, in_dim=4, out_dim=4, text_dim=8, freq_dim=8
    )
    arrays = random_arrays(abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))[1])
    path = tmp_path / "wan2.1-t2v-1.3b.gguf"
    meaning = gguf_file(gguf, path, original(dit.table(config), arrays), kind)
    convert_checkpoint(path, tmp_path / "converted")
    found = safetensors.numpy.load_file(tmp_path / "converted" / "dit.safetensors")
    assert_same(original(dit.table(config), found), meaning)
    down = found["blocks.feed_forward.down.kernel"].dtype
    assert down == {"F16": np.float16, "BF16": jnp.bfloat16}.get(kind, np.float32)
    content = path.read_bytes()
    for length in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"cannot read .*1\.3b\.gguf"):
            open_source(path)


# --- relatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize(
    ("extra", "type", "name"),
    [
        ("vace_patch_embedding.weight", "vace", "VACE"),
        ("casual_audio_encoder.weights", "s2v", "S2V"),
        ("face_adapter.fuser_blocks.0.q.weight", "animate", "Animate"),
        ("ref_conv.weight", "i2v", "Fun-Control with a reference"),
        ("control_adapter.conv.weight", "i2v", "Camera"),
    ],
)
def test_relatives_are_called_by_name(tensors, tmp_path, extra, type, name, described):
    file = save(tmp_path / "x.safetensors", tensors | {extra: np.ones((2, 2), np.float32)})
    if described:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": type, "dim": 32}))
    with pytest.raises(UserError, match=name) as error:
        plan(open_source(file))
    assert str(error.value).splitlines()[-1].strip().startswith("fix:      ditmem convert")
    if name == "VACE":
        assert len(only(file, base=True).part.tensors) == len(tensors)


def test_fun_control_has_the_channels_of_another_kind(tmp_path):
    config = DiTConfig(
        dim=128, ffn_dim=64, num_heads=1, num_layers=1, in_dim=48, text_dim=8, freq_dim=8, image_dim=8
    )
    arrays = random_arrays(abstract(lambda: DiT(config, rngs=nnx.Rngs(0)))[1])
    network = only(save(tmp_path / "x.safetensors", original(dit.table(config), arrays)))
    assert network.config == config and "Fun-Control" in network.notes[0]


def test_numbers_of_blocks_become_ranges():
    assert compact(["blocks.0.x", "blocks.1.x", "blocks.3.x", "head", "blocks.2.y"]) == [
        "blocks.{0-1,3}.x", "head", "blocks.2.y",
    ]  # fmt: skip


# --- out again, and errors elsewhere ----------------------------------------------------------------------------


def test_out_again_as_one_file_for_comfyui(tensors, tmp_path):
    convert_checkpoint(save(tmp_path / "x.safetensors", tensors), tmp_path / "converted")
    assert export_file(tmp_path / "converted", tmp_path / "out" / "wan.safetensors") == {}
    assert_same(safetensors.numpy.load_file(tmp_path / "out" / "wan.safetensors"), tensors)
    with pytest.raises(UserError, match="exists"):
        export_file(tmp_path / "converted", tmp_path / "out" / "wan.safetensors")


@pytest.fixture(scope="module")
def experts_converted(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    for name in ("high", "low"):
        save(folder / "source" / f"{name}_noise.safetensors", tensors)
    convert_checkpoint(folder / "source", folder / "converted")
    return folder / "converted"


def test_two_experts_for_comfyui_are_two_files(experts_converted, tmp_path):
    with pytest.raises(
        UserError, match=r"two transformers(.|\n)*ditmem convert --export=comfyui .*out, a folder"
    ):
        export_file(experts_converted, tmp_path / "out.safetensors")
    export_folder(experts_converted, tmp_path / "out", "comfyui")
    assert {network.role for network in plan(open_source(tmp_path / "out"))} == {"dit", "dit_high"}


def test_a_folder_of_diffusers_is_a_pipeline(experts_converted, tmp_path):
    export_folder(experts_converted, tmp_path / "out", "diffusers")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert (index["_class_name"], index["boundary_ratio"], index["vae"]) == (
        "WanPipeline",
        0.875,
        [None, None],
    )
    assert index["transformer"] == index["transformer_2"] == ["diffusers", "WanTransformer3DModel"]
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 12 and scheduler["use_flow_sigmas"]
    assert {network.role for network in plan(open_source(tmp_path / "out"))} == {"dit", "dit_high"}


def test_weights_that_are_not_converted_are_told_to_be(tensors, tmp_path):
    folder = save(tmp_path / "Wan" / "model.safetensors", tensors).parent
    for described in (None, {"model_type": "t2v", "dim": 32}):
        if described:
            (folder / "config.json").write_text(json.dumps(described))
        config = replace(tiny_config(tmp_path), "weights", path=str(folder))
        with pytest.raises(
            UserError, match=rf"is not converted(.|\n)*ditmem convert {folder} {folder}-converted"
        ):
            check_weights(config, "dit")
    with pytest.raises(UserError, match="is not converted"):
        read_index(folder)


def test_a_released_encoder_is_told_to_be_converted(tmp_path):
    names = {"pipe.dit_mem.high_pass_module.feature_proj.weight": np.ones((2, 2), np.float32)}
    file = save(tmp_path / "DiT-Mem-1.3B.safetensors", names)
    with pytest.raises(UserError, match=rf"released memory encoder(.|\n)*ditmem convert {file} "):
        encoder_metadata(file)
    (tmp_path / "DiT-Mem.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"DiT-Mem\.pth is not converted(.|\n)*then --encoder="):
        encoder_metadata(tmp_path / "DiT-Mem.pth")
