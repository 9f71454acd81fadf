"""Weights of words in a caption: rare words, numbers as wholes; the same on every machine."""

import math
import subprocess
import sys

import numpy as np
import pytest

from ditmem_jax.bank.lexical import POWER, LexicalEmbedder, WordIndex, words
from ditmem_jax.worlds.captions import caption
from ditmem_jax.worlds.laws import PHENOMENA, splits
from ditmem_jax.worlds.simulate import Clip, sample_scene

NO_VIDEO, NO_PATH = np.zeros((0, 0, 0, 3), np.uint8), np.zeros((0, 1, 2))


def test_search_by_words_starts_no_accelerator():
    """bm25s would: it asks JAX for the best of a few numbers when it is imported."""
    code = "import sys, ditmem_jax.bank.lexical; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words():
    assert words("On Zorvex, g = 6.2 m/s^2: 3 balls.") == [
        "on",
        "zorvex",
        "g",
        "6.2",
        "m",
        "s",
        "2",
        "3",
        "balls",
    ]


@pytest.mark.parametrize(
    "text, found",
    [
        ("Café CAFE\u0301 ﬁne", ["cafe", "cafe", "fine"]),  # one letter or two, and a ligature
        ("１２ naïve", ["12", "naive"]),
        ("Ёлка İstanbul Straße", ["елка", "istanbul", "strasse"]),
        ("قِطَّة", ["قطة"]),
        ("黑猫", ["黑猫", "黑", "猫"]),
        ("猫が走る", ["猫", "が", "走", "る"]),
        ("ソファ", ["ソフ", "ファ"]),
        ("แมว", ["แม", "มว"]),
        ("काली बिल्ली", ["काली", "बिल्ली"]),  # signs of vowels are of their word
        ("고양이가", ["고양", "양이", "이가"]),
        ("Wan2 的", ["wan", "2", "的"]),
    ],
)
def test_words_of_any_script(text, found):
    assert words(text) == found


CHINESE = (
    "一只橘猫在草地上奔跑",
    "一个女孩在海边放风筝",
    "夜晚的城市街道上有很多汽车",
    "海边的日落",
    "一只黑猫在沙发上睡觉",
)
THAI = ("แมวสีส้มวิ่งบนสนามหญ้า", "เด็กผู้หญิงเล่นว่าวที่ชายหาด", "รถยนต์มากมายบนถนนในเมือง", "พระอาทิตย์ตกที่ชายหาด")
JAPANESE = (
    "オレンジ色の猫が芝生の上を走る",
    "女の子が海辺で凧を揚げる",
    "夜の街の通りに車がたくさんある",
    "ソファで眠る黒猫",
)
HINDI = ("एक नारंगी बिल्ली घास पर दौड़ती है", "एक लड़की समुद्र तट पर पतंग उड़ाती है", "रात में शहर की सड़क पर कई कारें")


@pytest.mark.parametrize(
    "captions, query, right",
    [
        (CHINESE, "猫", {0, 4}), (CHINESE, "女孩放风筝", {1}), (CHINESE, "黑猫 沙发", {4}), (THAI, "แมว", {0}),
        (THAI, "ชายหาด", {1, 3}), (JAPANESE, "猫", {0, 3}), (JAPANESE, "夜の車", {2}), (HINDI, "बिल्ली", {0}),
        (HINDI, "शहर की सड़क", {2}),
    ],
)  # fmt: skip
def test_captions_of_any_script_are_found(captions, query, right):
    embedder = LexicalEmbedder.fit(captions)
    by_vectors = embedder.documents(captions) @ embedder.queries([query])[0]
    by_words = WordIndex(captions).scores(query)
    for scores in (by_vectors, by_words):
        assert set(np.argsort(-scores)[: len(right)].tolist()) == right and scores.max() > 0.1


def test_rare_endings_do_not_hide_what_captions_are_about():
    captions = [f"a {('red', 'blue', 'green')[i % 3]} ball falls, take {i}" for i in range(150)]
    embedder = LexicalEmbedder.fit(captions)
    by_vectors = embedder.documents(captions) @ embedder.queries(["blue"])[0]
    index = WordIndex(captions)
    for scores in (by_vectors, index.scores("blue")):
        assert {i % 3 for i in np.argsort(-scores)[:50].tolist()} == {1}
    assert index.scores("blue").max() == pytest.approx(1) and (index.scores("blue")[::3] == 0).all()
    assert not index.scores("submarine").any() and not WordIndex(["", "?"]).scores("a").any()
    assert (
        index.shared("a submarine dives", captions[0]) < 0.1 < index.shared("a blue submarine", captions[1])
    )


def test_bm25_by_hand():
    """Two captions of equal length; ball stands in both, red in one: Lucene's weights to the power POWER."""
    index = WordIndex(["red ball", "blue ball"])
    common, rare = math.log(1 + 0.5 / 2.5) ** POWER, math.log(1 + 1.5 / 1.5) ** POWER
    np.testing.assert_allclose(
        index.scores("a red ball")[0],
        (common + rare) / (common + rare + math.log(1 + 2.5 / 0.5) ** POWER),
        rtol=1e-5,
    )
    np.testing.assert_allclose(index.scores("red ball"), [1, common / (common + rare)], rtol=1e-5)


def test_unit_vectors():
    embedder = LexicalEmbedder.fit(["a ball", "a block"], dim=64)
    vectors = embedder.documents(["a ball", "the ball ball", "..."])
    assert vectors.dtype == np.float32 and vectors.shape == (3, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0], atol=1e-6)


def test_cosine_by_hand():
    # Long vectors, so that no two of these words overlap. a: 2 of 2 captions; ball: 1; block: 1.
    embedder = LexicalEmbedder.fit(["a ball", "a block"], dim=1 << 16)
    common, rare = math.log(3 / 2.5) ** 2, math.log(3 / 1.5) ** 2
    ball, block = embedder.documents(["a ball", "a block"])
    assert ball @ block == pytest.approx(common**2 / (common**2 + rare**2), abs=1e-6)


def test_order_and_case_do_not_count():
    embedder = LexicalEmbedder.fit(["a ball falls on zorvex"])
    first, second = embedder.documents(["A ball falls on Zorvex", "on zorvex falls, a ball"])
    np.testing.assert_array_equal(first, second)


def test_the_hash_is_fixed():
    embedder = LexicalEmbedder.fit(["block"], dim=33)
    np.testing.assert_array_equal(np.flatnonzero(embedder.queries(["block"])[0]), np.array([0]))
    ball = np.flatnonzero(embedder.queries(["ball"])[0])
    np.testing.assert_array_equal(ball, 1 + np.array([0, 2, 5, 15, 16, 20, 21, 22]))


@pytest.mark.slow
@pytest.mark.parametrize("clips", [2, 6])
def test_the_planet_outweighs_everything_else(clips):
    rng = np.random.default_rng(0)
    worlds, captions = [], []
    for world in splits(0).unseen:
        for phenomenon in PHENOMENA:
            for _ in range(clips):
                scene = sample_scene(rng, world, phenomenon)
                captions.append(caption(Clip(NO_VIDEO, scene, NO_PATH), world.name))
                worlds.append(world.name)
    vectors, index = LexicalEmbedder.fit(captions).documents(captions), WordIndex(captions)
    for scores in (vectors @ vectors.T, np.stack([index.scores(text) for text in captions])):
        np.fill_diagonal(scores, -1)
        nearest = np.argsort(-scores, axis=1)[:, :5]
        share = (np.array(worlds)[nearest] == np.array(worlds)[:, None]).mean()
        assert share > 0.99


def test_word_counts_are_in_one_order():
    captions = ["delta alpha charlie", "bravo alpha"]
    assert list(LexicalEmbedder.fit(captions).frequency) == ["alpha", "bravo", "charlie", "delta"]
