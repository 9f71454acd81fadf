"""Streams of batches: content, order, epochs, processes, restored positions, workers."""

import itertools

import jax
import numpy as np
import pytest

from ditmem_jax.data.pipeline import training_data
from ditmem_jax.data.record import Record
from ditmem_jax.data.records import Meta, RecordReader, RecordWriter
from ditmem_jax.errors import UserError

META = Meta(latents=(2, 2, 2, 3), text_dim=4, dtype="float32")
COUNT = 7
MATCHES = np.stack([(np.arange(COUNT) + 1) % COUNT, np.full(COUNT, -1)], axis=1)


def write(folder, count=COUNT, meta=META, value=lambda index: index):
    """Records whose latents are all `value(index)`, with texts of 1, 2, 3, 1, 2, ... tokens of `index`."""
    with RecordWriter(folder, meta, shard_size=3) as writer:
        for index in range(count):
            latents = np.full(meta.latents, value(index), np.float32)
            text = np.full((1 + index % 3, meta.text_dim), index, np.float32)
            writer.add(Record(str(index), "a caption", "a.mp4", latents=latents, text_embedding=text))
    return RecordReader(folder)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write(tmp_path_factory.mktemp("records"))


def stream(records, count, matches=MATCHES, batch_size=3, seed=0, text_len=5, **options):
    data = training_data(records, matches, batch_size, seed=seed, text_len=text_len, **options)
    return list(itertools.islice(data, count))


def ids(batches):
    return [batch.ids.tolist() for batch in batches]


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_holds_what_the_records_say(records):
    (batch,) = stream(records, 1, shuffle=False)
    assert batch.ids.tolist() == ["0", "1", "2"]
    np.testing.assert_array_equal(
        batch.latents, np.ones((3, *META.latents)) * np.arange(3).reshape(3, 1, 1, 1, 1)
    )
    np.testing.assert_array_equal(
        batch.conditioning.text[:, :, 0], [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [2, 2, 2, 0, 0]]
    )
    np.testing.assert_array_equal(batch.present, [[True, False]] * 3)
    np.testing.assert_array_equal(batch.references[:, :, 0, 0, 0, 0], [[1, 0], [2, 0], [3, 0]])
    assert batch.references.shape == (3, 2, *META.latents)


def test_references_come_from_the_bank(records, tmp_path):
    bank = write(tmp_path, count=20, value=lambda index: 100 + index)
    (batch,) = stream(records, 1, matches=np.full((COUNT, 1), 19), bank=bank, shuffle=False)
    np.testing.assert_array_equal(batch.references, np.full((3, 1, *META.latents), 119))
    np.testing.assert_array_equal(batch.latents[:, 0, 0, 0, 0], [0, 1, 2])


def test_every_epoch_holds_each_record_once_in_an_order_of_its_own(records):
    seen = [id for batch in ids(stream(records, 14)) for id in batch]
    epochs = [seen[start : start + COUNT] for start in range(0, 42, COUNT)]
    assert all(sorted(epoch) == [str(i) for i in range(COUNT)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_seed_decides_the_order(records):
    first = stream(records, 5, seed=1)
    assert_equal(stream(records, 5, seed=1, cache=True), first)
    assert ids(stream(records, 5, seed=2)) != ids(first)


def test_a_finite_stream_ends(records):
    assert ids(stream(records, 99, epochs=1, shuffle=False)) == [["0", "1", "2"], ["3", "4", "5"]]
    whole = stream(records, 99, epochs=1, shuffle=False, drop_remainder=False)
    assert ids(whole)[2:] == [["6"]]


def test_processes_share_each_batch(records):
    whole = stream(records, 4, batch_size=4)
    parts = [stream(records, 4, batch_size=4, rows=np.array(rows)) for rows in ([0, 2], [1, 3])]

    def join(a, b, both):
        return np.stack([a, b], axis=1).reshape(both.shape)

    joined = [jax.tree.map(join, *three) for three in zip(*parts, whole, strict=True)]
    assert_equal(joined, whole)


def test_a_small_data_set_fills_large_batches(records):
    (batch,) = stream(records, 1, batch_size=16)
    assert len(batch.ids) == 16


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_goes_on_where_another_stopped(records, workers):
    """Whoever reads, across the ends of epochs."""
    iterator = iter(training_data(records, MATCHES, 3, seed=5, text_len=5, start=4, workers=workers))
    assert_equal([next(iterator) for _ in range(4)], stream(records, 8, seed=5)[4:])
    if workers:
        iterator.close()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(matches=MATCHES[1:]), "a row for each record"),
        (dict(matches=MATCHES + 1), "outside the bank"),
        (dict(matches=MATCHES - 1), "outside the bank"),
        (dict(epochs=1, batch_size=8), "does not fill one batch"),
        (dict(rows=np.arange(2), drop_remainder=False, epochs=1), "may not be there"),
        (dict(text_len=2, shuffle=False), "too long"),
    ],
)
def test_what_does_not_go_together_is_refused(records, options, message):
    with pytest.raises(UserError, match=message):
        stream(records, 1, **options)


def test_a_bank_of_other_latents_is_refused(records, tmp_path):
    bank = write(tmp_path, meta=Meta((1, 2, 2, 3), 4, "float32"))
    with pytest.raises(UserError, match="does not fit the records"):
        stream(records, 1, bank=bank)


def test_what_records_keep_of_given_frames_is_in_the_batch(tmp_path):
    with RecordWriter(tmp_path / "records", META) as writer:
        for index in range(2):
            told = {
                "frames": np.full((2, 2, 2, 7), index, np.float32),
                "image": np.full((5, 6), -index, np.float32),
            }
            latents, text = np.zeros(META.latents, np.float32), np.zeros((1, META.text_dim), np.float32)
            writer.add(Record(str(index), "", "", latents=latents, text_embedding=text, condition=told))
    records = RecordReader(tmp_path / "records")
    assert records[1].condition.keys() == {"frames", "image"}
    (batch,) = stream(records, 1, np.full((2, 1), -1), batch_size=2, shuffle=False)
    np.testing.assert_array_equal(
        batch.conditioning.frames, np.ones((2, 2, 2, 2, 7)) * [[[[[0]]]], [[[[1]]]]]
    )
    np.testing.assert_array_equal(batch.conditioning.image, np.ones((2, 5, 6)) * [[[0]], [[-1]]])
