"""How fast a program compiled for TPUs can be at best, read from what the compiler made of it.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and nothing inside a Pallas kernel.
So the text of the compiled program is read here:

    operations    of matrix products and convolutions, as XLA counts them; those of a Pallas kernel by formula
    HBM bytes     inputs and outputs of every instruction that lie in HBM; of slices of a stacked array the slice only
    collectives   bytes that one chip sends

all times the trips of the loops around them; of the branches of a choice the dearest counts. The roof is the time
that the chip needs at its published peak for the largest of the three: no program runs faster, a good one comes near.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published numbers of one chip, per second: bfloat16 operations, bytes of HBM, bytes sent over all its links."""

    name: str
    operations: float
    hbm_bytes: float
    link_bytes: float
    hbm: int  # bytes that the compiler gives to programs, which is less than the chip has


# By the kind that JAX calls it: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
CHIPS = {
    "TPU v5 lite": Chip("v5e", 197e12, 819e9, 200e9, int(15.75 * GIB)),
    "TPU v5": Chip("v5p", 459e12, 2765e9, 600e9, int(95.74 * GIB)),
    "TPU v6 lite": Chip("v6e", 918e12, 1640e9, 400e9, int(31.25 * GIB)),
}


class Cost(NamedTuple):
    """Of one chip: `kernels` are the operations of Pallas kernels, which `operations` leaves out."""

    operations: float
    kernels: float
    hbm_bytes: float
    collectives: Counter  # bytes sent by (kind, shape of the result)

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        sent = Counter(self.collectives)
        for name, size in other.collectives.items():
            sent[name] += times * size
        return Cost(*(a + times * b for a, b in zip(self[:3], other[:3], strict=True)), collectives=sent)


NOTHING = Cost(0.0, 0.0, 0.0, Counter())


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes


BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "c64": 8}
ARRAY = re.compile(r"\b(pred|bf16|[usfc]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
# Nothing moves for these: they name values, or their bodies are counted.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-done"),
}
SLICES = ("dynamic-slice", "dynamic-update-slice")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations of Pallas' splash kernels per pair of a query and a key and feature of a head: 2 for each product.
KERNELS = {"fwd": 4, "dkv": 8, "dq": 6}
KERNEL_ROWS = 1024  # queries (or keys) for which a kernel reads all keys (or queries) anew


class Program:
    """The text of a compiled program, by computation."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.shapes: dict[str, str] = {}
        self.entry, self.uncounted = "", Counter()
        body: list[Instruction] = []
        for line in text.splitlines():
            if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                body = self.computations[header[2]] = []
                self.entry = header[2] if header[1] else self.entry
            elif found := INSTRUCTION.match(line):
                name, shape, opcode, rest = found.groups()
                inside, rest = _split_operands(rest)
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                body.append(Instruction(name, shape, opcode, operands, inside + rest))
                self.shapes[name] = shape

    def cost(self) -> Cost:
        return self._cost(self.entry)

    def kept(self, layers: int, weights: set[tuple[str, tuple[int, ...]]]) -> int:
        """Bytes that the loop over the layers keeps of each for the backward pass, in HBM.

        Args:
            weights: dtype and shape of the stacked weights, which the loop carries as well.
        """
        sizes = [0]
        for body in self.computations.values():
            for instruction in body:
                if instruction.opcode == "while" and self._trips(instruction) == layers:
                    stacked = [
                        x
                        for x in _arrays(instruction.shape)
                        if x[1][:1] == (layers,) and x[:2] not in weights
                    ]
                    sizes.append(sum(_size(x) for x in stacked if not x[2]))
        return max(sizes)

    @functools.cache  # noqa: B019  (a program lives as long as its report)
    def _cost(self, computation: str) -> Cost:
        total = NOTHING
        for instruction in self.computations[computation]:
            total = total.plus(self._of(instruction))
        return total

    def _of(self, instruction: Instruction) -> Cost:
        kind, rest = instruction.opcode, instruction.rest
        if kind == "while":
            return NOTHING.plus(self._cost(_named(rest, "body")), self._trips(instruction))
        if kind == "conditional":
            names = re.search(r"(?:branch_computations|true_computation)=(.*?)(?:, metadata|$)", rest)[1]
            branches = map(self._cost, re.findall(r"%([\w.\-]+)", names))
            return max(branches, key=lambda cost: cost.operations + cost.kernels)
        if kind in ("call", "async-start"):
            return self._cost(_named(rest, "to_apply" if kind == "call" else "calls"))
        cost = NOTHING._replace(hbm_bytes=self._moved(instruction))
        if kind == "fusion":
            inside = self._cost(_named(rest, "calls"))
            return cost._replace(
                operations=inside.operations, kernels=inside.kernels, collectives=inside.collectives
            )
        if kind in ("convolution", "dot"):
            return cost._replace(operations=self._products(instruction))
        if kind == "custom-call" and "tpu_custom_call" in rest:
            return self._kernel(instruction)
        if kind.removesuffix("-start") in COLLECTIVES:
            what, size = self._sent(kind.removesuffix("-start"), instruction)
            return cost._replace(collectives=Counter({what: size}))
        return cost

    def _trips(self, instruction: Instruction) -> int:
        """Of a loop that counts to a constant; 1 for any other."""
        condition = self.computations[_named(instruction.rest, "condition")]
        found = (re.match(r"\d+", x.rest) for x in condition if x.opcode == "constant")
        return max((int(number[0]) for number in found if number), default=1)

    def _moved(self, instruction: Instruction) -> float:
        """Bytes of HBM that an instruction reads and writes."""
        kind = instruction.opcode
        if kind in FREE or kind.endswith("-done"):
            return 0.0
        if kind == "fusion":
            return self._moved_by_fusion(instruction)
        out = _in_hbm(instruction.shape)
        if kind in ("dynamic-slice", "slice", "broadcast", "gather"):
            return 2.0 * out
        if kind == "dynamic-update-slice":
            return 2.0 * _in_hbm(self.shapes[instruction.operands[1]])
        if kind.endswith("-start"):  # its result names its operands too
            return float(out)
        return float(out) + sum(_in_hbm(self.shapes.get(name, "")) for name in instruction.operands)

    def _moved_by_fusion(self, instruction: Instruction) -> float:
        """Its inputs and result, but of a stacked array only the slice that is read, or written in its place."""
        body = self.computations[_named(instruction.rest, "calls")]
        total, in_place = 0.0, 0.0
        for inner in (x for x in body if x.opcode == "parameter"):
            outside = self.shapes[instruction.operands[int(re.match(r"\d+", inner.rest)[0])]]
            users = [x for x in body if inner.name in x.operands]
            sliced = [x for x in users if x.opcode in SLICES and x.operands[0] == inner.name]
            if len(sliced) < len(users) or not users:
                total += _in_hbm(outside)
            elif _in_hbm(outside):
                for x in sliced:
                    update = x.opcode == "dynamic-update-slice"
                    total += _full(self.shapes[x.operands[1]] if update else x.shape)
                    in_place += _full(outside) if update else 0
        return total + max(0.0, _in_hbm(instruction.shape) - in_place)

    def _products(self, instruction: Instruction) -> float:
        """Operations of a product or convolution, with only the taps that fall on values, not on padding."""
        left, right = (_arrays(self.shapes[name])[0][1] for name in instruction.operands[:2])
        out = _arrays(instruction.shape)[0][1]
        if instruction.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
            return 2.0 * math.prod(out) * math.prod(left[int(x)] for x in axes.split(",") if x)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
        inputs, kernel, outputs = labels.groups()
        window = re.search(r"window=\{([^}]*)\}", instruction.rest)
        window = dict(part.split("=") for part in window[1].split()) if window else {}
        groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
        total = 2.0 * right[kernel.index("i")] * out[outputs.index("b")] * out[outputs.index("f")]
        for axis in sorted(set(inputs) - {"b", "f"}):
            total *= _taps(
                left[inputs.index(axis)],
                right[kernel.index(axis)],
                out[outputs.index(axis)],
                {name: value.split("x")[int(axis)] for name, value in window.items()},
            )
        return total / (int(groups[1]) if groups else 1)

    def _kernel(self, instruction: Instruction) -> Cost:
        """Operations and bytes of splash attention, from its shapes; others are noted in `uncounted`."""
        found = re.search(r"splash_mha_(fwd|dkv|dq)", instruction.name)
        inputs = [x for name in instruction.operands for x in _arrays(self.shapes.get(name, ""))]
        heads = [x for x in inputs if len(x[1]) == 3 and x[0] in ("bf16", "f32")]
        moved = float(_in_hbm(instruction.shape) + sum(map(_size, inputs)))
        if not found or len(heads) < 2:
            self.uncounted[instruction.name] += 1
            return NOTHING._replace(hbm_bytes=moved)
        (count, queries, width), (_, keys, _) = heads[0][1], heads[1][1]
        outer, inner = (keys, heads[0]) if found[1] == "dkv" else (queries, heads[1])
        again = (math.ceil(outer / KERNEL_ROWS) - 1) * 2 * _size(inner)
        operations = float(KERNELS[found[1]]) * count * queries * keys * width
        return NOTHING._replace(kernels=operations, hbm_bytes=moved + again)

    def _sent(self, kind: str, instruction: Instruction) -> tuple[tuple[str, str], float]:
        """The kind of a collective, and the bytes that a chip sends in it."""
        arrays, count = _arrays(instruction.shape), _group(instruction.rest)
        largest, size = max(arrays, key=_size), float(sum(map(_size, arrays)))
        if instruction.opcode.endswith("-start") and kind != "all-reduce":
            # What starts the others names its operands beside its results.
            size -= sum(_full(self.shapes[name]) for name in instruction.operands)
        share = (count - 1) / count
        factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "reduce-scatter": count - 1.0}
        label = f"{largest[0]}[{','.join(map(str, largest[1]))}]"
        return (kind, label), factors.get(kind, share) * size


def _split_operands(text: str) -> tuple[str, str]:
    """The text before the parenthesis that closes the one open at the start of `text`, and the text after it."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _named(text: str, attribute: str) -> str:
    return re.search(rf"\b{attribute}=%?([\w.\-]+)", text)[1]


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """Dtype, sizes, and whether it lies outside of HBM, of every array in a shape."""
    return [
        (dtype, tuple(int(x) for x in sizes.split(",") if x), "S(" in (layout or ""))
        for dtype, sizes, layout in (found.groups() for found in ARRAY.finditer(shape))
    ]


def _size(array: tuple[str, tuple[int, ...], bool]) -> int:
    return BYTES.get(array[0], 4) * math.prod(array[1])


def _in_hbm(shape: str) -> int:
    return sum(_size(array) for array in _arrays(shape) if not array[2])


def _full(shape: str) -> int:
    return sum(map(_size, _arrays(shape)))


def _taps(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of an output and a tap of one axis of a convolution whose input is neither padding nor a hole."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, holes, spread = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    place = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(((place >= 0) & (place % holes == 0) & (place // holes < size)).sum())


def _group(text: str) -> int:
    """How many chips take part in one group of a collective."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    return 2
