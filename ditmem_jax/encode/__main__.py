"""Turn videos and captions into records: latents of the frozen VAE and text embeddings, computed once.

    ditmem encode --table captions.csv --videos videos --out records
    ditmem encode --config wan --table OpenVid-1M.csv --videos 'OpenVid_part*.zip' --out records --engine ray

The table (CSV, TSV, JSON or parquet) has a row for each video. The videos lie in a folder, in zip or tar files, in input
records or in the parquet file itself. Without a table each takes its caption from the file beside it.

The same command continues an interrupted run. On complete records it takes up what has changed: rows that were added or
removed, captions, files. It tries the videos again that could not be encoded; these are listed with the reason in
skipped.csv beside the records. Records that were damaged meanwhile are refused.

Long films are cut into clips by columns start and end of the table, in seconds, or by --clips, which takes frames at the
model's own rate.
"""

import collections
import dataclasses
from pathlib import Path

from absl import flags

from ditmem_jax.config import flags as cli
from ditmem_jax.errors import UserError


def main() -> None:
    config = CONFIG()
    video = {"resize": RESIZE.value, "hdr": HDR.value, "clips": CLIPS.value}
    video |= {"sampling": "rate" if CLIPS.value else None}
    given = {name: value for name, value in video.items() if value is not None}
    config = dataclasses.replace(config, video=dataclasses.replace(config.video, **given))
    if TABLE.value is None and not VIDEOS.value:
        raise UserError(
            "nothing to encode", expected="--table, --videos or both", fix="see ditmem encode --help"
        )
    cluster = CLUSTER()

    from ditmem_jax.encode.dataset import encode_videos
    from ditmem_jax.encode.engines import OnRay

    engine = OnRay(*cluster) if cluster else None
    options = dict(batch=BATCH.value, minimum=MINIMUM.value, strict=STRICT.value)
    options |= dict(video_column=VIDEO_COLUMN.value, caption_column=CAPTION_COLUMN.value)
    summary = encode_videos(config, OUT.value, VIDEOS.value, TABLE.value, engine, **options)
    print(f"{summary}: {OUT.value}")
    if summary.again or summary.retold or summary.removed:
        print("banks that were made of these records hold what they were before: build them again")
    if summary.left_out:
        suffixes = collections.Counter(Path(name).suffix.lower() or "no suffix" for name in summary.left_out)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
        print(
            f"not taken, since neither videos nor their captions: {kinds}; such as {', '.join(summary.left_out[:5])}"
        )
    if summary.complaints:
        worst = sorted(summary.complaints, key=summary.complaints.__getitem__, reverse=True)[:5]
        told = ", ".join(f"{id} ({summary.complaints[id]})" for id in worst)
        print(
            f"{len(summary.complaints)} videos of which FFmpeg tells errors: {told}; --strict leaves them out"
        )
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
        "table",
        None,
        "CSV, TSV, JSON (lines or an array) or parquet with a column of videos, such as video or file_name, and one of "
        "captions, such as caption or text.",
    )
    VIDEOS = flags.DEFINE_multi_string(
        "videos",
        [],
        "Folder, zip or tar file, folder of input records, or a pattern such as 'part*.zip'; may be repeated. "
        "By default the table's own folder.",
    )
    OUT = flags.DEFINE_string("out", None, "Folder for the records.", required=True)
    VIDEO_COLUMN = flags.DEFINE_string("video_column", None, "Column of the table that names the videos.")
    CAPTION_COLUMN = flags.DEFINE_string("caption_column", None, "Column of the table with the captions.")
    STRICT = flags.DEFINE_bool(
        "strict", False, "Leave out videos of which FFmpeg tells errors, and fail if any video was skipped."
    )
    HDR = flags.DEFINE_enum("hdr", None, ["map", "skip"], "Overrides config.video.hdr.")
    CLIPS = flags.DEFINE_string(
        "clips",
        None,
        "Clips at the model's frame rate: head, middle or uniform:N. Sets config.video.sampling to rate.",
    )
    RESIZE = flags.DEFINE_enum("resize", None, ["stretch", "crop"], "Overrides config.video.resize.")
    BATCH = flags.DEFINE_integer("batch", 4, "Clips that are encoded at once.", lower_bound=1)
    MINIMUM = flags.DEFINE_integer("min_frames", 2, "Frames that a video must have.", lower_bound=1)
    CLUSTER = cli.define_cluster("encodes")
    cli.run(main)
