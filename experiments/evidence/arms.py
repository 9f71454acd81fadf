"""The ways to train a memory that are compared, one factor at a time from one base: the tiny configuration."""

from experiments.evidence.study import Arm

AS_RELEASED = {"memory.gate": "none", "memory.reading": 0, "memory.strength": 0.02}
LONG = {"run.steps": 9_000}
# An eighth of the noise levels below 0.5, so that the gate learns to close there; the others evenly above.
ALL_LEVELS = {"objective.density": "spectrum", "objective.spectrum": (0.025,) * 5 + (0.175,) * 5}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("reading 384 long", LONG, planets=384),
        Arm("reading 384 long all levels", ALL_LEVELS | LONG, planets=384),
        Arm("reading 384", planets=384),
        Arm("reading"),
        Arm("as released", AS_RELEASED),
        Arm("reading 384 mixed", planets=384, mixed=0.5),
        Arm("gate", {"memory.reading": 0}),
        Arm("fixed gate", {"memory.reading": 0, "memory.gate": "fixed"}),
        Arm("reading later", {"memory.blocks": (2, 5)}),
    )
}
