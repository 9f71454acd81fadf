"""Turn videos and captions into records: latents of the frozen VAE and text embeddings, computed once.

    ditmem encode --table captions.csv --videos videos --out records
    ditmem encode --config wan --table OpenVid-1M.csv --videos 'OpenVid_part*.zip' --out records --engine ray

The table (CSV, parquet or JSON lines) has a row for each video. The videos lie in a folder, in zip or tar files, which
are not unpacked, or in input records. Without a table each takes its caption from the text file beside it.

The same command continues an interrupted run. On complete records it takes up rows that were added to the table, and
tries the videos again that could not be encoded; these are listed with the reason in skipped.csv beside the records.
Records that were damaged meanwhile are refused.
"""

import dataclasses
from pathlib import Path

from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError


def main() -> None:
    config = CONFIG()
    if RESIZE.value:
        config = dataclasses.replace(config, video=dataclasses.replace(config.video, resize=RESIZE.value))
    if TABLE.value is None and not VIDEOS.value:
        raise UserError(
            "nothing to encode", expected="--table, --videos or both", fix="see ditmem encode --help"
        )
    cluster = CLUSTER()

    from ditmem_jax.encode.dataset import encode_videos
    from ditmem_jax.encode.engines import OnRay

    engine = OnRay(*cluster) if cluster else None
    options = dict(batch=BATCH.value, minimum=MINIMUM.value)
    summary = encode_videos(config, OUT.value, VIDEOS.value, TABLE.value, engine, **options)
    print(f"{summary}: {OUT.value}")
    if summary.skipped:
        reasons = Path(OUT.value) / "skipped.csv"
        print(f"the reasons are in {reasons}")
        if STRICT.value:
            raise UserError(
                f"{len(summary.skipped)} videos were skipped", expected="none, since --strict was given"
            )


if __name__ == "__main__":
    CONFIG = cli.define_config("tiny")
    TABLE = flags.DEFINE_string(
        "table", None, "CSV, parquet or JSON lines with columns video (or video_path) and caption."
    )
    VIDEOS = flags.DEFINE_multi_string(
        "videos",
        [],
        "Folder, zip or tar file, folder of input records, or a pattern such as 'part*.zip'; may be repeated. "
        "By default the table's own folder.",
    )
    OUT = flags.DEFINE_string("out", None, "Folder for the records.", required=True)
    STRICT = flags.DEFINE_bool("strict", False, "Fail if any video was skipped.")
    RESIZE = flags.DEFINE_enum("resize", None, ["stretch", "crop"], "Overrides config.video.resize.")
    BATCH = flags.DEFINE_integer("batch", 4, "Clips that are encoded at once.", lower_bound=1)
    MINIMUM = flags.DEFINE_integer("min_frames", 2, "Frames that a video must have.", lower_bound=1)
    CLUSTER = cli.define_cluster("encodes")
    cli.run(main)
