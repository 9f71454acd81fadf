"""The engine: layouts, stacking, aliases, and every kind of finding in one message."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ditmem_jax.convert.engine import TRANSFORMS, Rule, Table, convert, load, targets
from ditmem_jax.errors import UserError

LAYERS = 12


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.proj = nnx.Linear(2, 3, rngs=rngs)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Layer, in_axes=0, out_axes=0)(rngs.split(LAYERS))
        self.scale = nnx.Param(jnp.ones((3,)))
        self.shift = nnx.Param(jnp.zeros((3,)))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


RULES = (
    Rule("layer.{i}.weight", "layers.proj.kernel", "linear"),
    Rule("layer.{i}.bias", "layers.proj.bias"),
    Rule("gamma", "scale", "flatten"),
    Rule("beta", "shift"),
)


@pytest.fixture
def network():
    return nnx.eval_shape(lambda: Network(nnx.Rngs(0)))


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    tensors = {"gamma": rng.standard_normal((3, 1, 1)), "beta": rng.standard_normal(3)}
    for i in range(LAYERS):
        tensors |= {f"layer.{i}.weight": rng.standard_normal((3, 2)), f"layer.{i}.bias": np.full(3, float(i))}
    return {name: x.astype(np.float32) for name, x in tensors.items()}


def test_layouts_by_hand():
    assert TRANSFORMS["linear"](np.zeros((5, 7))).shape == (7, 5)
    assert TRANSFORMS["conv2d"](np.zeros((5, 7, 1, 2))).shape == (1, 2, 7, 5)
    assert TRANSFORMS["conv3d"](np.zeros((5, 7, 1, 2, 3))).shape == (1, 2, 3, 7, 5)
    patch = np.arange(2 * 3 * 1 * 2 * 2).reshape(2, 3, 1, 2, 2)  # [O, I, T, H, W] -> [T H W I, O]
    assert TRANSFORMS["patch"](patch)[:4].tolist() == [[0, 12], [4, 16], [8, 20], [1, 13]]


def test_layers_are_stacked_in_the_order_of_their_numbers(network, tensors):
    load(network, Table(RULES), dict(sorted(tensors.items())))  # as text, layer.10 comes before layer.2
    np.testing.assert_array_equal(network.layers.proj.bias[...][:, 0], np.arange(LAYERS))
    for i in range(LAYERS):
        np.testing.assert_array_equal(network.layers.proj.kernel[...][i], tensors[f"layer.{i}.weight"].T)
    np.testing.assert_array_equal(network.scale[...], tensors["gamma"].ravel())


def test_every_finding_in_one_message(network, tensors):
    del tensors["layer.3.bias"], tensors["beta"]
    tensors["layer.5.weight"] = np.zeros((2, 3), np.float32)
    tensors["layer.12.bias"] = tensors["layer.0.bias"]
    tensors["head.weight"] = np.zeros((4, 4), np.float32)
    tensors["second"] = np.zeros(3, np.float32)
    tensors["left"] = np.zeros(1, np.float32)
    rules = (*RULES, Rule("second", "scale"), Rule("left", "nowhere"))
    with pytest.raises(UserError) as error:
        convert(Table(rules), tensors, targets(network))
    message = str(error.value)
    for finding in (
        "7 findings",
        "unknown tensor head.weight [4, 4]",
        "second and gamma both fill scale",
        "layer.3.bias is missing for layers.proj.bias",
        "layer.12.bias is one layer too many: layers.proj.bias holds 12",
        "layer.5.weight gives shape [3, 2], layers.proj.kernel needs [2, 3]",
        "nothing fills shift [3]: beta is missing",
        "left has no place: the module has no nowhere",
    ):
        assert finding in message


def test_a_number_of_axes_that_a_layout_does_not_have(network, tensors):
    tensors["layer.0.weight"] = np.zeros((3, 2, 1), np.float32)
    with pytest.raises(UserError, match=r"layer\.0\.weight gives shape \[1, 2, 3\]"):
        convert(Table(RULES), tensors, targets(network))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(network, tensors, value):
    tensors["layer.7.bias"][1] = value
    with pytest.raises(UserError, match=r"layer\.7\.bias holds values that are not finite"):
        convert(Table(RULES), tensors, targets(network))


def test_aliases_are_one_tensor(network, tensors):
    table = Table(RULES, aliases={r"^block\.": "layer."})
    only_alias = {name.replace("layer.", "block."): x for name, x in tensors.items()}
    for given in (only_alias, only_alias | tensors):
        load(network, table, given)
        np.testing.assert_array_equal(network.layers.proj.bias[...][:, 1], np.arange(LAYERS))
    only_alias["block.4.bias"] = only_alias["block.4.bias"] + 1
    with pytest.raises(
        UserError, match=r"block\.4\.bias and layer\.4\.bias are names of one tensor but differ"
    ):
        convert(table, only_alias | tensors, targets(network))


def test_prefixes_and_ignored_names(network, tensors):
    table = Table(RULES, ignored={r"\.counter$": "nothing reads it"}, prefixes=("pipe.", "pipe.net."))
    prefixed = {f"pipe.net.{name}": x for name, x in tensors.items()} | {
        "pipe.net.layer.0.counter": np.zeros(1)
    }
    load(network, table, prefixed)
    np.testing.assert_array_equal(network.scale[...], tensors["gamma"].ravel())


def test_the_modules_dtype_wins(network, tensors):
    wanted = targets(network)
    half = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    assert all(x.dtype == np.float32 for x in convert(Table(RULES), half, wanted).values())


def test_generators_are_no_weights(network):
    assert sorted(targets(network)) == ["layers.proj.bias", "layers.proj.kernel", "scale", "shift"]
