"""What a step cache costs and saves: steps computed, and the distance from all steps, with the tiny Wan.

    python -m experiments.benchmarks.step_cache
    python -m experiments.benchmarks.step_cache --clips=2 --out=small.json

Clips of captions of unseen planets, without a memory, by each solver over 40 steps. The distances are relative L2,
of latents from those of all steps; beside them stands that of other seeds' clips of the same captions. Results go to `step_cache.json` beside this file and to the table in the README.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.config.files import load_config
from ditmem_jax.parallel.mesh import all_gather_to_host
from ditmem_jax.progress import make_progress
from ditmem_jax.sample.sampler import Sampler
from ditmem_jax.storage.files import write_text
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, splits
from ditmem_jax.worlds.simulate import sample_clip
from experiments import provenance

RESULTS = Path(__file__).with_name("step_cache.json")
README = Path(__file__).with_name("README.md")
TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.4)


def main() -> None:
    config, rng = load_config("tiny", {"sample.steps": 40}), np.random.default_rng(0)
    worlds = splits(0, unseen=CLIPS.value).unseen
    prompts = [
        caption(sample_clip(rng, w, sorted(PHENOMENA)[i % len(PHENOMENA)])) for i, w in enumerate(worlds)
    ]
    seeds, rows = list(range(len(prompts))), []
    sampler = Sampler.load(config, prompts=prompts)

    def clips(solver: str, tolerance: float, seeds: list[int]) -> tuple[np.ndarray, float]:
        each = sampler.with_sampling(solver=solver, step_cache=tolerance)
        latents = all_gather_to_host(each.latents(prompts, seeds), each.mesh)
        return latents, 40 if each.computed is None else float(each.computed.mean())

    def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    with make_progress() as progress:
        bar = progress.add_task("sampling", total=2 * (len(TOLERANCES) + 2))
        for solver in ("euler", "unipc"):
            every, _ = clips(solver, 0.0, seeds)
            other, _ = clips(solver, 0.0, [seed + 1000 for seed in seeds])
            progress.advance(bar, 2)
            for tolerance in TOLERANCES:
                found, computed = clips(solver, tolerance, seeds)
                row = {"solver": solver, "tolerance": tolerance, "computed": round(computed, 1)}
                row |= {"latents": distance(found, every), "another seed": distance(other, every)}
                rows.append(row)
                progress.advance(bar)
    about = {"commit": provenance.commit(), "device": provenance.processor(), "clips": len(prompts)}
    about["digests"] = provenance.folder_digests("ditmem_jax/diffusion", "ditmem_jax/models")
    out = Path(OUT.value)
    write_text(out, json.dumps(about | {"rows": rows}, indent=1) + "\n")
    lines = [
        "| solver | tolerance | steps computed of 40 | latents, from all steps | of another seed |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['solver']} | {row['tolerance']} | {row['computed']:.1f} | {row['latents']:.1%} | {row['another seed']:.0%} |"
        for row in rows
    ]
    print("\n".join(lines))
    if out == RESULTS:
        before, rest = README.read_text().split("<!-- step cache -->\n", 1)
        after, table = rest.split("<!-- end of step cache -->", 1)[1], "\n".join(lines)
        write_text(README, f"{before}<!-- step cache -->\n{table}\n<!-- end of step cache -->{after}")


if __name__ == "__main__":
    CLIPS = flags.DEFINE_integer("clips", 24, "Clips of a row.", lower_bound=1)
    OUT = flags.DEFINE_string("out", str(RESULTS), "File for the results, instead of those that are kept.")
    cli.run(main)
