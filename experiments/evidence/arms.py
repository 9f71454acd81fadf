"""The ways to train a memory that are compared, one factor at a time from one base."""

from experiments.evidence.study import Arm

GATE = {"memory.strength": None, "memory.num_layers": 6, "memory.gate": "learned", "optim.gate_rate": 10.0}
READING = GATE | {"memory.reading": 16}
# An eighth of the noise levels below 0.5, so that the gate learns to close there; the others evenly above.
ALL_LEVELS = {"objective.density": "spectrum", "objective.spectrum": (0.025,) * 5 + (0.175,) * 5}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("reading 384 long", READING | {"run.steps": 9_000}, planets=384),
        Arm("reading 384 long all levels", READING | ALL_LEVELS | {"run.steps": 9_000}, planets=384),
        Arm("reading 384", READING, planets=384),
        Arm("reading", READING),
        Arm("shipped"),
        Arm("reading 384 mixed", READING, planets=384, mixed=0.5),
        Arm("gate", GATE),
        Arm("fixed gate", GATE | {"memory.gate": "fixed"}),
        Arm("reading later", READING | {"memory.blocks": (2, 5)}),
    )
}
