"""Clips through every family's processor: time stamps, M-RoPE positions, and answers under pruning."""

import numpy as np
import oracle
import pytest
import torch
from cases import PRUNERS
from families import FAMILIES, IMAGE, VIDEO
from PIL import Image
from test_laws import dropped_of, generate, model_of
from videos import picture, processor

import vlmprune
from vlmprune import adapters
from vlmprune.ask import prompt_inputs
from vlmprune.video import Clip

QWEN = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe"]
VIDEO_FAMILIES = [*QWEN, "internvl", "llava-onevision", "llava-next-video"]


def clip(frames: int = 8, fps: float = 4.0, size: tuple[int, int] = (16, 24)) -> Clip:
    return Clip.of([picture(i, *size) for i in range(frames)], fps)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_a_clip_is_asked_about_and_pruned(family, frames):
    model = FAMILIES[family].model()
    inputs = prompt_inputs(processor(family), "what is it?", clips=[clip(frames)])
    with vlmprune.prune(model, "uniform", keep=0.5) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    item = session.last.items[0]
    whole = frames + frames % 2 if family in QWEN else frames  # a temporal patch takes two
    expected = {"internvl": 9 * whole, "llava-onevision": 4 * whole + 1, "llava-next-video": 4 * whole}
    assert session.last.tokens_before == expected.get(family, whole // 2 * 6)
    assert session.last.tokens_after < session.last.tokens_before
    assert len(item.geometry.grids) in (1, whole, whole // 2)


@pytest.mark.parametrize("fps", [1.0, 4.0, 29.97])
def test_qwen2_5_is_told_how_long_a_temporal_patch_lasts(fps):
    inputs = prompt_inputs(processor("qwen2.5-vl"), "?", clips=[clip(8, fps)])
    assert inputs["second_per_grid_ts"] == pytest.approx([2 / fps])


def rows(family: str, part: Clip) -> torch.Tensor:
    """Temporal M-RoPE position of each temporal patch, from the first."""
    model = FAMILIES[family].model()
    inputs = prompt_inputs(processor(family), "?", clips=[part])
    names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    positions, _ = model.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})
    visual = positions[0, 0][inputs["input_ids"][0] == VIDEO]
    return (visual - visual[0]).reshape(int(inputs["video_grid_thw"][0, 0]), -1)[:, 0]


def test_mrope_positions_follow_the_real_time():
    """Qwen2.5-VL counts tokens_per_second = 4 positions a second (2 a second in some checkpoints)."""
    rate = FAMILIES["qwen2.5-vl"].model().config.vision_config.tokens_per_second
    assert rows("qwen2.5-vl", clip(8, 1.0)).tolist() == [2 * rate * i for i in range(4)]
    every = clip(32, 4.0)
    # Every fourth frame of the second half: frames a second apart, although the file has four a second.
    assert rows("qwen2.5-vl", every.take(range(16, 32, 4))).tolist() == [0, 2 * rate]
    half = rows("qwen2.5-vl", every.take(range(0, 32, 2)))
    assert half.tolist() == [rate * i for i in range(8)]


def test_qwen3_writes_the_seconds_of_each_temporal_patch():
    tool = processor("qwen3-vl")

    def stamps(part: Clip) -> str:
        text = tool.tokenizer.decode(prompt_inputs(tool, "?", clips=[part])["input_ids"][0])
        return [piece.split(" seconds>")[0] for piece in text.split("<")[1:] if " seconds>" in piece]

    assert stamps(clip(4, 4.0)) == ["0.1", "0.6"]
    assert stamps(clip(32, 4.0).take([8, 12, 20, 31])) == ["2.5", "6.4"]
    times = np.array([0.0, 0.5, 3.0, 9.0])
    varying = Clip(clip(4).frames, times, np.arange(4), fps=0.4, duration=10.0, total=4)
    assert stamps(varying) == ["0.2", "6.0"]


def test_a_family_without_video_gets_the_frames_as_pictures():
    inputs = prompt_inputs(processor("llava-clip-llama"), "what is it?", clips=[clip(3)])
    assert inputs["pixel_values"].shape[0] == 3
    assert int((inputs["input_ids"] == FAMILIES["llava-clip-llama"].model().config.image_token_id).sum()) == 75


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-onevision"])
def test_videos_and_pictures_in_one_prompt(family):
    model = FAMILIES[family].model()
    images = clip(1, size=(24, 24)).images
    inputs = prompt_inputs(processor(family), "what is it?", images, [clip(4), clip(4, 2.0)])
    with vlmprune.prune(model, "random", keep=0.5) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(session.last.items) == 3


def test_videos_that_do_not_fit_together():
    with pytest.raises(ValueError, match="equally many frames"):
        prompt_inputs(processor("llava-onevision"), "what is it?", clips=[clip(4), clip(2)])


@pytest.mark.parametrize("question", [" ", "a <video>?", "an <image>?"])
def test_questions_that_cannot_be_asked(question):
    with pytest.raises(ValueError, match="question"):
        prompt_inputs(processor("llava-onevision"), question, clips=[clip()])


def test_internvl_takes_the_frames_of_a_video_together_once_it_can_read():
    """One item around the words between the frames, where the processor is known; images beside it stay images."""
    family, write = FAMILIES["internvl"].model(), processor("internvl")
    image = Image.fromarray(picture(9, 24, 24))
    prompt = "<IMG_CONTEXT>\n<video>\n<video>\nFrame1: look <IMG_CONTEXT> what?"
    clips = [torch.stack([torch.from_numpy(picture(i, 24, 24)).movedim(-1, 0) for i in range(n)]) for n in (3, 3)]
    inputs = write(text=[prompt], images=[image, image], videos=clips, return_tensors="pt", do_sample_frames=False)
    runs = 8
    with torch.no_grad(), vlmprune.prune(family, "uniform", keep=0.5, processor=write) as session:
        family(**inputs)
        together = session.last.items
        family.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert [item.start for item in session.last.items] == [item.start for item in together]
    assert [(item.geometry.kind, len(item.geometry.grids)) for item in together] == [
        ("image", 1),
        ("video", 3),
        ("video", 3),
        ("image", 1),
    ]
    assert [item.tokens_before for item in together] == [9, 27, 27, 9]
    columns = torch.cat([item.start + torch.arange(9) if item.columns is None else item.columns for item in together])
    assert torch.equal(columns, (inputs["input_ids"][0] == IMAGE).nonzero().flatten())
    with torch.no_grad(), vlmprune.prune(family, "evs", keep=0.5) as session:
        logits = family(**inputs).logits
        assert [item.tokens_before for item in session.last.items] == [9, 27, 27, 9], "the processor is remembered"
    adapters.introduce(family, None)
    with torch.no_grad(), vlmprune.prune(family, "uniform", keep=0.5) as session:
        family(**inputs)
        assert [item.tokens_before for item in session.last.items] == [9] * runs
    assert logits.shape[1] < inputs["input_ids"].shape[1]


def test_an_internvl_video_equals_the_oracle():
    """Pruned in one piece, at the boundary and inside the decoder, it says what the masked model says."""
    family, write = FAMILIES["internvl"], processor("internvl")
    inputs = prompt_inputs(write, "what is it?", clips=[clip(4)])
    for pruner in ("evs", "compose"):
        for policy in family.positions:
            model = model_of(family)
            with vlmprune.prune(model, PRUNERS[pruner].make(positions=policy), processor=write) as session:
                out = generate(model, inputs)
            adapters.introduce(model, None)
            (item,) = session.last.items
            assert item.geometry.grids == ((3, 3),) * 4
            forced = out.sequences[:, inputs["input_ids"].shape[1] :]
            dropped = dropped_of(session.last, inputs)
            _, scores = oracle.run(model, inputs, dropped, policy, len(out.logits) - 1, forced, {})
            for mine, theirs in zip(out.logits, scores):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
