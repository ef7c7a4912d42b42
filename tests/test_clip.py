"""CLIP scores: that they are the library's own, and that the bundled CLIP really finds what a question names."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from vlmprune import bundled
from vlmprune.clip import ClipScorer
from vlmprune.scenes import COLOURS, digit_scenes

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer()


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


def test_frames_are_found_by_digit_by_colour_and_by_both(scorer):
    """Of eight test scenes exactly one holds what the question names; chance is an eighth."""
    pool = list(digit_scenes("test", 120, seed=5, kinds=[]))
    holds = [{(thing.digit, thing.colour) for thing in scene.objects} for scene in pool]
    rows, random = scorer.embed([scene.image for scene in pool]), np.random.default_rng(5)
    asked = {
        "digit": [(f"What colour is the {digit}?", {(digit, colour) for colour in COLOURS}) for digit in range(10)],
        "colour": [(f"When does the {c} digit vanish?", {(digit, c) for digit in range(10)}) for c in COLOURS],
        "both": [(f"Is there a {c} {digit}?", {(digit, c)}) for c in COLOURS for digit in range(10)],
    }
    for kind, least in (("digit", 0.85), ("colour", 0.9), ("both", 0.6)):
        hits = []
        for question, named in asked[kind]:
            with_it = [i for i, things in enumerate(holds) if things & named]
            without = [i for i, things in enumerate(holds) if not things & named]
            score = rows @ scorer.text(question)[0]
            for one in with_it[:6]:
                others = random.choice(without, 7, replace=False)
                hits.append(bool(score[one] > score[others].max()))
        assert len(hits) >= 36
        assert np.mean(hits) >= least, kind


def test_patches_point_at_what_the_question_names(scorer):
    shown = asked = 0
    for scene in digit_scenes("test", 60, seed=9, digits=(3, 4)):
        things = [(f"the {thing.colour} {thing.digit}", at) for at, thing in enumerate(scene.objects)]
        score, grid = scorer.patches([scene.image], [words for words, _ in things])
        assert grid == (12, 12)
        assert score.shape == (1, 144, len(things))
        for column, (_, at) in enumerate(things):
            shown += scene.coverage(8)[at].ravel()[score[0, :, column].argmax()] > 0
            asked += 1
    assert shown / asked > 0.9


def test_the_committed_evaluation_beats_chance():
    import json

    figures = json.loads((bundled.clip_path() / "evaluation.json").read_text())
    assert all(entry["right"] / entry["of"] > 0.7 for entry in figures.values())
    assert sum(file.stat().st_size for file in bundled.clip_path().iterdir()) < 3e6


def test_the_order_of_frames_and_the_batch_do_not_matter(scorer):
    images = noise(*[(96, 96)] * 5)
    whole = scorer.frames(images, "a red 7")
    single = ClipScorer(batch_size=2).frames(images[::-1], "a red 7").flip(0)
    assert whole == pytest.approx(single, abs=1e-5)
    assert whole.dtype == torch.float32
    stack = np.stack([np.asarray(image) for image in images])
    assert torch.equal(scorer.frames(stack, "a red 7"), whole)
    assert scorer.frames(images, ["a red 7", "a 3"]).shape == (5, 2)


def test_pictures_of_any_size_and_mode(scorer):
    images = [*noise((1, 1), (7, 300), (96, 96)), Image.new("L", (20, 30)), Image.new("RGBA", (9, 9))]
    score, _ = scorer.patches(images, "a 7")
    assert score.shape == (5, 144)
    assert torch.isfinite(score).all()
    assert scorer.seen(300, 7) == (0, 0, 1, 1)


def test_long_questions_are_cut_and_unknown_words_are_no_harm(scorer):
    image = next(digit_scenes("test", 1)).image
    assert torch.isfinite(scorer.frames([image], "which digit " * 200)).all()
    assert torch.isfinite(scorer.frames([image], "Ωμέγα \n 数字?")).all()


def test_scores_are_those_of_open_clip(scorer):
    folder = f"local-dir:{bundled.clip_path()}"
    model, _, preprocess = open_clip.create_model_and_transforms(folder)
    image = next(digit_scenes("test", 1, seed=2)).image
    with torch.no_grad():
        rows = model.eval().encode_image(preprocess(image)[None], normalize=True)
        words = model.encode_text(open_clip.get_tokenizer(folder)(["a 3"]), normalize=True)
    assert scorer.frames([image], "a 3") == pytest.approx((rows @ words.T)[0], abs=1e-5)
    assert ClipScorer(folder).frames([image], "a 3") == pytest.approx(scorer.frames([image], "a 3"))


def test_a_model_of_open_clips_own_with_weights_from_a_file(tmp_path):
    """ViT patches are the pooled row's path for every patch; without the last norm they are the raw states."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    file = tmp_path / "tiny-test-clip.json"
    file.write_text(__import__("json").dumps(config))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test-clip")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    scorer = ClipScorer("tiny-test-clip", str(tmp_path / "weights.pt"))
    images = noise((40, 60), (32, 32))
    assert scorer.frames(images, "a dog").shape == (2,)
    score, grid = scorer.patches(images, "a dog")
    assert (score.shape, grid) == ((2, 16), (4, 4))
    left, top, right, bottom = scorer.seen(60, 40)
    assert (left, right, top, bottom) == (pytest.approx(1 / 6), pytest.approx(5 / 6), 0, 1)
    visual = model.eval().visual
    with torch.no_grad():
        visual.output_tokens = True
        states = visual(scorer._towers.pixels(images))[1]
        expected = F.normalize(states @ visual.proj, dim=-1) @ scorer.text("a dog")[0]
    assert score == pytest.approx(expected, abs=1e-5)
    raw = ClipScorer("tiny-test-clip", str(tmp_path / "weights.pt"), post_norm=False).patches(images, "a dog")[0]
    assert not torch.allclose(raw, score, atol=1e-3)


def test_a_resnet_scores_frames_but_has_no_patches(tmp_path):
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    file = tmp_path / "tiny-test-resnet.json"
    file.write_text(__import__("json").dumps(config))
    open_clip.add_model_config(file)
    torch.save(open_clip.create_model("tiny-test-resnet").state_dict(), tmp_path / "weights.pt")
    scorer = ClipScorer("tiny-test-resnet", str(tmp_path / "weights.pt"))
    assert scorer.frames(noise((32, 32)), "a dog").shape == (1,)
    with pytest.raises(ValueError, match="without patches"):
        scorer.patches(noise((32, 32)), "a dog")


def test_a_timm_tower(tmp_path):
    pytest.importorskip("timm")
    config = {
        "embed_dim": 192,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    file = tmp_path / "tiny-test-timm.json"
    file.write_text(__import__("json").dumps(config))
    open_clip.add_model_config(file)
    torch.save(open_clip.create_model("tiny-test-timm").state_dict(), tmp_path / "weights.pt")
    score, grid = ClipScorer("tiny-test-timm", str(tmp_path / "weights.pt")).patches(noise((32, 32)), "a dog")
    assert (score.shape, grid) == ((1, 196), (14, 14))


def test_a_transformers_folder(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 257},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    letters = {chr(at): at for at in range(33, 127)} | {f"{chr(at)}</w>": at + 100 for at in range(33, 127)}
    vocabulary = {**letters, "<|startoftext|>": 256, "<|endoftext|>": 257}
    tokenizer = CLIPTokenizerFast(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(tmp_path)
    scorer, images = ClipScorer(tmp_path), noise((32, 50), (32, 32))
    words = tokenizer(["a dog"], return_tensors="pt")
    with torch.inference_mode():
        out = model(**words, pixel_values=scorer._towers.pixels(images))
    assert scorer.frames(images, "a dog") == pytest.approx(
        out.logits_per_image[:, 0] / model.logit_scale.detach().exp(), abs=1e-5
    )
    score, grid = scorer.patches(images, "a dog")
    assert (score.shape, grid) == ((2, 16), (4, 4))
    assert torch.isfinite(scorer.frames(images, "dogs " * 100)).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("ViT-Z-99",), "knows no model 'ViT-Z-99'"),
        (("ViT-B-32",), r"give the weights.*openai"),
        (("ViT-B-32", "nowhere.pt"), "cannot be loaded"),
        (("./nowhere",), "no such folder"),
        (("{tmp}",), "holds no CLIP"),
        (("{tmp}/broken",), "cannot be loaded"),
        (("{tmp}/broken-too",), "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_sentence(tmp_path, arguments, sentence):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "open_clip_config.json").write_text("{}")
    (tmp_path / "broken-too").mkdir()
    (tmp_path / "broken-too" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=sentence) as caught:
        ClipScorer(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert "\n" not in str(caught.value)


def test_empty_input_is_refused(scorer):
    with pytest.raises(ValueError, match="no pictures"):
        scorer.frames([], "a 7")
    with pytest.raises(ValueError, match="empty"):
        scorer.frames(noise((9, 9)), "  ")
    with pytest.raises(ValueError, match="at least 1"):
        ClipScorer(batch_size=0)


def test_without_open_clip_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'pip install "vlmprune\[clip\]"'):
        ClipScorer()
