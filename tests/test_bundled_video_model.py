from collections import defaultdict

import pytest
import torch

import vlmprune
from vlmprune import bundled

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from vlmprune.video_scenes import VIDEO_KINDS, Clip, digit_clips

FLOOR = 0.92  # the model card's mean accuracy less what 130 questions may be off


@pytest.fixture(scope="module")
def loaded():
    return bundled.load_video()


@pytest.fixture(scope="module")
def asked():
    """24 clips of every length and their questions."""
    clips = digit_clips("test", 24, seed=41)
    return [(clip, question) for clip in clips for question in clip.questions]


def inputs_of(processor, pairs: list[tuple[Clip, str]]):
    """One left-padded batch."""
    chats = [[{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}] for _, text in pairs]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    metadata = [[{"fps": clip.fps, "total_num_frames": len(clip)}] for clip, _ in pairs]
    videos = [[clip.frames] for clip, _ in pairs]
    return processor(text=prompts, videos=videos, video_metadata=metadata, padding=True, return_tensors="pt")


def ask(model, processor, pairs: list[tuple[Clip, str]]) -> list[str]:
    inputs = inputs_of(processor, pairs)
    with torch.inference_mode():
        out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]


def accuracy(model, processor, asked, size: int = 32) -> float:
    """Mean over the kinds of question."""
    right = defaultdict(list)
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        answers = ask(model, processor, [(clip, question.text) for clip, question in part])
        for (_, question), answer in zip(part, answers, strict=True):
            right[question.kind].append(answer == question.answer)
    assert set(right) == set(VIDEO_KINDS)
    return sum(sum(hits) / len(hits) for hits in right.values()) / len(right)


def test_the_folder_is_small_and_self_contained():
    files = list(bundled.video_model_path().iterdir())
    assert sum(file.stat().st_size for file in files) < 10 * 2**20
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= {
        file.name for file in files
    }


def test_it_loads_as_an_ordinary_checkpoint(loaded):
    model, processor = loaded
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert model.dtype == torch.float32
    assert not model.training
    assert processor.tokenizer.padding_side == "left"
    assert bundled.load_video(torch.bfloat16)[0].dtype == torch.bfloat16


def test_two_frames_are_36_tokens_and_every_word_is_known(loaded, asked):
    model, processor = loaded
    for clip, question in asked:
        inputs = inputs_of(processor, [(clip, question.text)])
        assert inputs["video_grid_thw"].tolist() == [[-(-len(clip) // 2), 12, 12]]
        assert (inputs["input_ids"] == model.config.video_token_id).sum() == 36 * -(-len(clip) // 2)
        assert (inputs["input_ids"] != processor.tokenizer.unk_token_id).all()
        assert processor.tokenizer.unk_token_id not in processor.tokenizer(question.answer)["input_ids"]


def test_time_passes_by_one_position_every_two_frames(loaded):
    model, processor = loaded
    clip = next(digit_clips("test", 1, frames=(12, 12)))
    inputs = inputs_of(processor, [(clip, "How many digits are there?")])
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs["second_per_grid_ts"],
        attention_mask=inputs["attention_mask"],
    )
    time = positions[0][inputs["input_ids"] == model.config.video_token_id]
    assert (time - time[0]).tolist() == [pair for pair in range(6) for _ in range(36)]


def test_the_chat_template_takes_the_video_itself(loaded, asked):
    processor = loaded[1]
    clip, question = asked[0]
    content = [{"type": "video", "video": clip.frames}, {"type": "text", "text": question.text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"videos_kwargs": {"video_metadata": {"fps": clip.fps, "total_num_frames": len(clip)}}},
    )
    expected = inputs_of(processor, [(clip, question.text)])
    assert set(inputs) == set(expected)
    assert all(torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(expected[name])) for name in expected)


def test_a_padded_batch_answers_like_single_prompts(loaded, asked):
    pairs = [(clip, question.text) for clip, question in asked[:8]]
    assert ask(*loaded, pairs) == [ask(*loaded, [pair])[0] for pair in pairs]


def test_it_answers_questions_about_clips_it_never_saw_and_pruning_can_be_told_from_chance(loaded, asked):
    model, processor = loaded
    full = accuracy(model, processor, asked)
    assert full >= FLOOR
    with vlmprune.prune(model, "divprune", keep=0.25) as session:
        diverse = accuracy(model, processor, asked)
    assert all(item.tokens_after == item.tokens_before // 4 for item in session.last.items)
    with vlmprune.prune(model, "random", keep=0.25):
        chance = accuracy(model, processor, asked)
    assert chance < diverse - 0.05


@pytest.mark.parametrize(("name", "stand_in"), [("vqtoken", "kmeans_tokens"), ("hicom", "hicom_local")])
def test_trained_modules_fit_it(loaded, asked, name, stand_in):
    """At a tenth of the tokens they are ahead of the same method without training."""
    model, processor = loaded
    weights = {"hicom": bundled.hicom_weights, "vqtoken": bundled.vqtoken_weights}[name](video=True)
    with vlmprune.prune(model, name, keep=0.1, weights=weights):
        trained = accuracy(model, processor, asked[:80])
    with vlmprune.prune(model, stand_in, keep=0.1):
        untrained = accuracy(model, processor, asked[:80])
    assert trained > untrained + 0.05


def test_a_predicted_budget_fits_it(loaded, asked):
    """QTSplus: more for longer clips, a quarter of the tokens on average, and most answers still right."""
    model, processor = loaded
    with vlmprune.prune(model, "qtsplus", weights=bundled.qtsplus_weights(video=True)) as session:
        right = accuracy(model, processor, asked[:80])
    counts = [item.tokens_after for item in session.last.items]
    assert len(set(counts)) > 3
    assert 0.15 < session.last.average_keep < 0.35
    assert right > 0.75
