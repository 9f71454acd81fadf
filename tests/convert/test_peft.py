"""Adapters of peft on a model of diffusers are converted, compute the same here, applied or merged, and go back.

Needs the extra `parity`; random models of a tiny size, no downloads.
"""

import jax
import numpy as np
import pytest

from ditmem_jax.config import AdapterConfig
from ditmem_jax.convert.adapters import from_peft, to_peft
from ditmem_jax.models import adapters as lora
from ditmem_jax.models.state import split

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.convert.test_peers import assert_close, channels_last, converted, error, transformer  # noqa: E402

DEFAULT = ["to_q", "to_k", "to_v", "to_out.0"]


def randomised(model):
    """The model with random A and B: as peft makes them, they change nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def velocity(structure, arrays, inputs):
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda arrays: structure.merge(arrays)(**inputs))(arrays)


@pytest.mark.parametrize(
    "targets", [DEFAULT, ["to_q", "ffn.net.0.proj", "ffn.net.2"]], ids=["attention", "more"]
)
def test_adapters_of_peft(tmp_path, targets):
    model, theirs, ours = transformer("t2v")
    structure, arrays = split(converted(model, "transformer", tmp_path))
    config = structure.merge(arrays).config
    bare = velocity(structure, arrays, ours)

    model = randomised(peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)))
    with torch.no_grad():
        expected = channels_last(model(**theirs).sample)
    assert error(bare, expected) > 0.05
    tensors = {name: x.numpy() for name, x in peft.get_peft_model_state_dict(model).items()}
    adapter, adapters = from_peft(config, tensors, alpha=6.0)
    if targets == DEFAULT:
        assert lora.attach(structure, AdapterConfig(4, 6.0))[1].keys() == adapters.keys()
    assert_close(velocity(lora.attach(structure, adapter)[0], arrays | adapters, ours), expected)

    with torch.no_grad():
        expected = channels_last(model.merge_and_unload()(**theirs).sample)
    assert_close(velocity(structure, lora.merge(arrays, adapters, adapter), ours), expected)

    back = to_peft(config, adapters, prefix="base_model.model.")
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x)


def test_the_start_is_drawn_as_in_peft():
    """Both uniform, from other generators: the same bound and spread."""
    layer = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(48, 8)), peft.LoraConfig(r=64, target_modules=["0"])
    )
    theirs = dict(layer.named_parameters())
    a = next(x.detach().numpy() for name, x in theirs.items() if "lora_A" in name)
    ours = lora.init({"q.lora.a": jax.ShapeDtypeStruct((48, 64), np.float32)}, jax.random.key(0))["q.lora.a"]
    assert np.abs(a).max() == pytest.approx(np.abs(ours).max(), rel=0.01)
    assert a.std() == pytest.approx(np.asarray(ours).std(), rel=0.02)
    assert all(not x.any() for name, x in theirs.items() if "lora_B" in name)
