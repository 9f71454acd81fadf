"""Models of sentence-transformers: the same vectors as that library's own, and as made by hand with transformers.

Needs the extra `parity`; random models of a tiny size, no downloads.
"""

import json

import numpy as np
import pytest
import tokenizers

from ditmem_jax.bank.embedders import load_embedder, make_embedder
from ditmem_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["a ball falls", "the block slides on ice", "ball", "  "]
WORDS = sorted({word for text in TEXTS for word in text.split()} | {"query", "passage", ":"})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a ModernBERT of 2 layers, [CLS] and prefixes; random weights."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    bert = transformers.ModernBertModel(
        transformers.ModernBertConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, pad_token_id=0,
            num_attention_heads=2, bos_token_id=2, cls_token_id=2, eos_token_id=3, sep_token_id=3,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    bert.save_pretrained(folder / "bert")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder / "bert"
    )
    modules = sentence_transformers.sentence_transformer.modules
    parts = [modules.Transformer(str(folder / "bert")), modules.Pooling(16, pooling_mode="cls")]
    prompts = {"query": "query : ", "passage": "passage : "}
    sentence_transformers.SentenceTransformer(modules=parts, prompts=prompts, device="cpu").save(
        str(folder / "whole")
    )
    return folder / "whole"


@pytest.fixture(scope="module")
def embedder(model):
    return make_embedder(f"sentence-transformers:{model}", [])


@pytest.mark.parametrize(("method", "prefix"), [("documents", "passage : "), ("queries", "query : ")])
def test_vectors_are_those_of_the_library_and_of_transformers_by_hand(model, embedder, method, prefix):
    got, texts = getattr(embedder, method)(TEXTS), [prefix + text for text in TEXTS[:3]]
    assert got.shape == (4, embedder.dim) == (4, 16)
    theirs = sentence_transformers.SentenceTransformer(str(model), device="cpu")
    np.testing.assert_allclose(got[:3], theirs.encode(texts, normalize_embeddings=True, prompt=""), atol=1e-6)
    bert = transformers.AutoModel.from_pretrained(model)
    tokens = transformers.AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        first = bert(**tokens).last_hidden_state[:, 0]
    by_hand = torch.nn.functional.normalize(first).numpy()
    np.testing.assert_allclose(got[:3], by_hand, atol=1e-6)
    assert not got[3].any()  # a text without words
    assert getattr(embedder, method)([]).shape == (0, 16)


def test_what_is_stored_leads_back(model, embedder, tmp_path):
    about = json.loads(json.dumps(embedder.describe()))
    assert (about["kind"], about["name"], about["dim"]) == ("sentence-transformers", str(model), 16)
    np.testing.assert_array_equal(load_embedder(about).queries(TEXTS), embedder.queries(TEXTS))
    changed = about | {"revision": "0" * 64}
    with pytest.raises(UserError, match="not those that the bank was built with"):
        load_embedder(changed)
    with pytest.raises(UserError, match=r"cannot load .*gone"):
        load_embedder(about | {"name": str(tmp_path / "gone")})


def copy(model, folder, file, change):
    for path in model.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(model)).write_bytes(path.read_bytes())
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(values)))
    return folder


def test_code_of_a_model_is_never_run(model, tmp_path):
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w')\n"
    folders = [
        copy(
            model,
            tmp_path / "part",
            "modules.json",
            lambda parts: [part | {"type": "own_code.Part"} for part in parts],
        ),
        copy(
            model,
            tmp_path / "network",
            "config.json",
            lambda config: (
                config
                | {
                    "model_type": "own",
                    "auto_map": dict.fromkeys(("AutoConfig", "AutoModel"), "own_code.Own"),
                }
            ),
        ),
    ]
    for folder in folders:
        (folder / "own_code.py").write_text(code)
        with pytest.raises(UserError, match="no code of its own"):
            make_embedder(f"sentence-transformers:{folder}", [])
    assert not mark.exists()


def test_a_folder_without_modules_is_no_model(model, tmp_path):
    with pytest.raises(UserError, match=r"modules\.json"):
        make_embedder(f"sentence-transformers:{model.parent / 'bert'}", [])
