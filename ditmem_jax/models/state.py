"""A network as its structure and a flat dictionary of arrays, the form that training and files work with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

Arrays = dict[str, Any]


class Structure(NamedTuple):
    """Everything of a network but its arrays; static under jit."""

    graph: nnx.GraphDef
    state: nnx.State

    def merge(self, arrays: Mapping[str, Any]) -> nnx.Module:
        """The network with these arrays, which may be traced, or shapes in their place."""
        flat = [
            (path, variable.replace(arrays[_dotted(path)]))
            for path, variable in nnx.to_flat_state(self.state)
        ]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def split(module: nnx.Module) -> tuple[Structure, Arrays]:
    """The structure of `module`, and its arrays by dotted path (stacked layers are one array)."""
    graph, state = nnx.split(module)
    arrays = {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return Structure(graph, shapes), arrays


def abstract(create: Callable[[], nnx.Module]) -> tuple[Structure, dict[str, jax.ShapeDtypeStruct]]:
    """`split(create())` without any arithmetic or memory: shapes and dtypes stand for the arrays."""
    return split(nnx.eval_shape(create))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
