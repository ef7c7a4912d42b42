from collections import defaultdict

import pytest
import torch

import vlmprune
from vlmprune import bundled


@pytest.fixture(scope="module")
def loaded():
    return bundled.load()


def ask(model, processor, pairs):
    """Answers to (image, question) pairs, in one left-padded batch."""
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in pairs]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(images=[[image] for image, _ in pairs], text=prompts, padding=True, return_tensors="pt")
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]


def test_the_folder_is_small_and_self_contained():
    files = list(bundled.model_path().iterdir())
    assert sum(file.stat().st_size for file in files) < 8 * 2**20
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= {
        file.name for file in files
    }


def test_it_loads_as_an_ordinary_checkpoint(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert model.dtype == torch.float32
    assert not model.training
    assert processor.tokenizer.padding_side == "left"
    assert bundled.load(torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_image_is_144_tokens_and_every_word_is_known(loaded):
    model, processor = loaded
    for scene in bundled.demo_scenes():
        for question in scene.questions:
            chat = [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}],
                }
            ]
            inputs = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144
            assert (inputs["input_ids"] != processor.tokenizer.unk_token_id).all()
            assert processor.tokenizer.unk_token_id not in processor.tokenizer(question.answer)["input_ids"]


def test_a_padded_batch_answers_like_single_prompts(loaded):
    pairs = [(scene.image, question.text) for scene in bundled.demo_scenes()[:3] for question in scene.questions]
    assert ask(*loaded, pairs) == [ask(*loaded, [pair])[0] for pair in pairs]


@pytest.mark.parametrize(
    ("name", "weights"),
    [("explain", bundled.explain_weights), ("hicom", bundled.hicom_weights), ("vqtoken", bundled.vqtoken_weights)],
)
def test_trained_modules_fit_it(loaded, name, weights):
    """A quarter of the tokens answers the demo questions nearly as well as all do; uniform loses a third of them."""
    asked = [(scene.image, question) for scene in bundled.demo_scenes() for question in scene.questions]
    pairs = [(image, question.text) for image, question in asked]
    with vlmprune.prune(loaded[0], name, keep=0.25, weights=weights()) as session:
        replies = ask(*loaded, pairs)
    assert all(item.tokens_after == 36 for item in session.last.items)
    assert sum(reply == question.answer for reply, (_, question) in zip(replies, asked)) >= 0.85 * len(asked)


def test_demo_scenes_cover_every_kind():
    from vlmprune.scenes import KINDS, SIZE

    scenes = bundled.demo_scenes()
    questions = [question for scene in scenes for question in scene.questions]
    assert len(scenes) == 6
    assert all(scene.image.size == (SIZE, SIZE) for scene in scenes)
    assert len(questions) >= 12
    assert {question.kind for question in questions} == set(KINDS)


def test_it_answers_questions_about_scenes_it_never_saw(loaded):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from vlmprune.scenes import digit_scenes

    right = defaultdict(list)
    asked = [(scene.image, question) for scene in digit_scenes("test", 128, seed=31) for question in scene.questions]
    for first in range(0, len(asked), 64):
        part = asked[first : first + 64]
        answers = ask(*loaded, [(image, question.text) for image, question in part])
        for (_, question), answer in zip(part, answers, strict=True):
            right[question.kind].append(answer == question.answer)
    shares = {kind: sum(values) / len(values) for kind, values in right.items()}
    assert sum(shares.values()) / len(shares) >= 0.93, shares
