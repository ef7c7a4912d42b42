"""generate() in all its modes, conversations on a returned cache, and long-lived sessions."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import oracle
import pytest
import torch
from cases import BATCHES, PRUNERS, widest
from families import FAMILIES
from test_laws import columns_of, dropped_of, generate, model_of
from transformers import DynamicCache

import vlmprune

LLAVA = FAMILIES["llava-clip-llama"]
several = pytest.mark.parametrize(
    "family", ["llava-clip-llama", "llava-onevision", "video-llava", "qwen3-vl", "internvl"]
)
"""Names of families whose language models, positions and ways of encoding differ."""
every_policy = pytest.mark.parametrize(
    ("family", "policy"),
    [pytest.param(case, policy, id=f"{case.name}-{policy}") for case in FAMILIES.values() for policy in case.positions],
)


@every_policy
def test_beam_search_equals_the_oracle(family: Any, policy: str) -> None:
    """Every hypothesis has the score that the oracle gives its tokens."""
    model = model_of(family)
    prompt = BATCHES["mixed"][2] if family.video_tokens else BATCHES["three"][0]
    if not hasattr(model, "_expand_multimodal_outputs") and "compact" in family.positions:
        # Up to transformers 5.17 the pictures of one prompt are repeated one by one: A A B B for two rows A B.
        prompt = [1, 2, ("image", 1), 3]
    inputs = family.inputs([prompt, [1, 2, 3]])
    steps = 5
    with vlmprune.prune(model, "divprune", keep=0.3, positions=policy) as session:
        out = generate(model, inputs, num_beams=3, num_return_sequences=2, max_new_tokens=steps, output_scores=True)
    assert len({item.sample for item in session.last.items}) == 3, "rows are expanded before the prefill"
    wide = family.inputs([prompt, prompt, [1, 2, 3], [1, 2, 3]])
    dropped = oracle.everything_visible(wide)
    for item in session.last.items:
        if item.sample < 2:
            lost = ~torch.isin(torch.arange(item.tokens_before), item.kept)
            dropped[0][item.sample, columns_of(item)[lost]] = True
    answer = out.sequences[:, wide["input_ids"].shape[1] :]
    _, scores = oracle.run(model, wide, dropped, policy, steps - 1, answer, {})
    total = torch.zeros(4)
    for step, logits in enumerate(scores):
        total += logits.log_softmax(-1).gather(1, answer[:, step : step + 1])[:, 0]
    torch.testing.assert_close(out.sequences_scores, total / steps, atol=1e-4, rtol=0)


def test_sampling_draws_from_the_pruned_distribution() -> None:
    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["one"])
    with vlmprune.prune(model, "divprune", keep=0.3):
        torch.manual_seed(0)
        out = generate(model, inputs, do_sample=True, num_return_sequences=4, temperature=1.5)
        assert len({tuple(row.tolist()) for row in out.sequences}) > 1
        greedy = generate(model, inputs)
    for row in range(4):
        torch.testing.assert_close(out.logits[0][row], greedy.logits[0][0], atol=1e-5, rtol=0)


def second_turns() -> Any:
    """(family, positions, pruner, attention, rows): each kind of stage and two rows where language models differ."""
    for case in FAMILIES.values():
        for policy in case.positions:
            many = case.name in ("qwen2.5-vl", "internvl")
            cases = [("divprune", attention, 1) for attention in ("eager", "sdpa")]
            if many or case is LLAVA:
                cases += [(pruner, "sdpa", rows) for pruner in ("staged", "compose") for rows in (1, 2)[1 - many :]]
            for pruner, attention, rows in cases:
                name = f"{case.name}-{policy}-{pruner}-{attention}-{rows}"
                yield pytest.param(case, policy, pruner, attention, rows, id=name)


@pytest.mark.parametrize(("family", "policy", "pruner", "attention", "rows"), second_turns())
def test_second_turn_with_a_new_image(family: Any, policy: str, pruner: str, attention: str, rows: int) -> None:
    """A returned cache goes on with text, then with another image: as the oracle on the whole conversation."""
    model = model_of(family, attention)
    first: list[Any] = [[1, 2, ("image", 0), 3, 4], [7, ("image", 2), 3]]
    turns = [first[:rows], [[5, 6, 7], [8, 9, 5]][:rows], [[8, ("image", 1), 9], [6, ("image", 1), 3]][:rows]]
    pictures = family.inputs([[("image", 0), ("image", 1)], [("image", 2), ("image", 1)]][:rows])
    pictures = {key: pictures[key] for key in pictures if key.startswith(("pixel", "image"))}
    cache, reports = DynamicCache(config=model.config), []
    ids = mask = torch.empty(rows, 0, dtype=torch.int64)
    with vlmprune.prune(model, PRUNERS[pruner].make(positions=policy)) as session:
        for turn in turns:
            new = family.inputs(turn)
            ids, mask = torch.cat([ids, new["input_ids"]], 1), torch.cat([mask, new["attention_mask"]], 1)
            inputs = {**new, "input_ids": ids, "attention_mask": mask, **family.marks(ids)}
            if "image_grid_thw" in new and reports:
                # M-RoPE: generate() would need the grids of all images to place the new one, and take all for new.
                inputs["position_ids"] = mrope(model, family, ids, mask, pictures["image_grid_thw"])
            before = cache.get_seq_length()
            out = generate(model, inputs, past_key_values=cache, max_new_tokens=4)
            assert cache.get_seq_length() == out.sequences.shape[1] - 1
            if any(key.startswith("pixel_values") for key in new):
                # The answer's last token is not in the cache yet.
                places = [start + before + bool(reports) for _, start, _ in family.spans(turn)]
                assert [item.start for item in session.last.items] == places
                reports.append(session.last)
            prompt, seen, ids = ids, mask, out.sequences
            mask = torch.cat([mask, torch.ones_like(ids[:, -4:])], 1)
    whole = {**pictures, **family.marks(prompt), "input_ids": prompt, "attention_mask": seen}
    one, two = (dropped_of(report, whole) for report in reports)
    dropped = {layer: one[layer] | two[layer] for layer in one}
    assert all(gone.any(1).all() for gone in (one[max(one)], two[max(two)]))
    _, scores = oracle.run(model, whole, dropped, policy, 3, ids[:, -4:], {})
    for mine, theirs in zip(out.logits, scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def mrope(model: Any, family: Any, ids: torch.Tensor, mask: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """Text positions and M-RoPE of a whole conversation, [4, B, S]."""
    rope, _ = model.model.get_rope_index(ids, image_grid_thw=grids, attention_mask=mask, **family.marks(ids))
    return torch.cat([(mask.cumsum(-1)[None] - 1).clamp(min=0), rope])


def test_text_turn_first_then_image() -> None:
    """An image may come when the cache already holds an unpruned turn, whatever the window."""
    for family in FAMILIES.values():
        model = model_of(family)
        cache = DynamicCache(config=model.config)
        with vlmprune.prune(model, "divprune", keep=0.3) as session:
            first = generate(model, family.inputs([[1, 2, 3]]), past_key_values=cache, max_new_tokens=3).sequences
            new = family.inputs([[5, ("image", 0), 6]])
            ids = torch.cat([first, new["input_ids"]], 1)
            grids = new.get("image_grid_thw")
            given = {} if grids is None else {"position_ids": mrope(model, family, ids, torch.ones_like(ids), grids)}
            out = generate(
                model,
                {**new, "input_ids": ids, "attention_mask": torch.ones_like(ids), **family.marks(ids), **given},
                past_key_values=cache,
                max_new_tokens=3,
            )
            item = session.last.items[0]
        assert item.start == 6 + family.spans([[5, ("image", 0), 6]])[0][1]
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        assert cache.layers[0].keys.shape[-2] == cache.get_seq_length() - item.tokens_before + item.tokens_after


@several
def test_no_cache_and_plain_forward_loop(family: str) -> None:
    """use_cache=False prunes anew at every step and says the same."""
    case = FAMILIES[family]
    model, inputs = model_of(case), case.inputs(BATCHES[widest(case)])
    for policy in case.positions:
        for method in ("divprune", "visionzip"):  # the latter looks into the tower
            with vlmprune.prune(model, method, keep=0.3, positions=policy):
                cached, plain = generate(model, inputs), generate(model, inputs, use_cache=False)
            for mine, theirs in zip(cached.logits, plain.logits):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@several
def test_prompt_lookup_decoding_crops_the_cache(family: str) -> None:
    """Assisted decoding verifies several tokens at once and crops what it rejects."""
    case = FAMILIES[family]
    model = model_of(case)
    inputs = case.inputs([[1, 2, 3, 1, 2, ("image", 0), 3, 4, 1, 2, 3]])
    for policy in case.positions:
        with vlmprune.prune(model, "divprune", keep=0.3, positions=policy):
            greedy = generate(model, inputs, max_new_tokens=16)
            lookup = generate(model, inputs, max_new_tokens=16, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, lookup.sequences)


def test_labels_are_cut_with_the_sequence_and_gradients_flow() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(BATCHES["unequal"])
    labels = (
        inputs["input_ids"]
        .masked_fill(inputs["input_ids"] == 99, -100)
        .masked_fill(inputs["attention_mask"] == 0, -100)
    )
    for pruner in ("divprune", "pool"):
        model.zero_grad()
        with vlmprune.prune(model, pruner, keep=0.3) as session:
            out = model(**inputs, labels=labels, use_cache=False)
            columns = session.last.columns
        cut = torch.full_like(columns, -100)
        for row, columns_of_row in enumerate(columns):
            for at, column in enumerate(columns_of_row.tolist()):
                if column >= 0:
                    cut[row, at] = labels[row, column]
        expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), cut[:, 1:].flatten())
        torch.testing.assert_close(out.loss, expected)
        out.loss.backward()
        assert sum(p.grad.abs().sum() for p in model.model.vision_tower.parameters() if p.grad is not None) > 0
    full = model(**inputs, labels=labels).loss
    with vlmprune.prune(model, "divprune", keep=1.0):
        assert torch.equal(model(**inputs, labels=labels).loss, full)
        loss, *_ = model(**inputs, labels=labels, return_dict=False)
        assert torch.equal(loss, full)


def test_right_padding_in_a_plain_forward() -> None:
    model = model_of(LLAVA)
    left = LLAVA.inputs(BATCHES["unequal"])
    right = {**left, "input_ids": left["input_ids"].clone(), "attention_mask": left["attention_mask"].clone()}
    for row, mask in enumerate(left["attention_mask"]):
        real = left["input_ids"][row][mask.bool()]
        right["input_ids"][row] = 0
        right["input_ids"][row, : len(real)] = real
        right["attention_mask"][row] = (torch.arange(len(mask)) < len(real)).long()
    with torch.no_grad(), vlmprune.prune(model, "divprune", keep=0.3) as session:
        a = model(**left).logits
        left_columns = session.last.columns
        b = model(**right).logits
        right_columns = session.last.columns
    for row in range(len(a)):
        torch.testing.assert_close(a[row][left_columns[row] >= 0], b[row][right_columns[row] >= 0], atol=1e-4, rtol=0)


def test_a_session_does_not_grow() -> None:
    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["unequal"])
    with vlmprune.prune(model, "divprune", keep=0.3) as session:
        generate(model, inputs, max_new_tokens=2)
        old = weakref.ref(session.last)
        gc.collect()
        tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        for _ in range(5):
            generate(model, inputs, max_new_tokens=2)
        gc.collect()
        assert old() is None
        assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= tensors
    assert dropped_of(session.last, inputs)[0].any()


def test_embeddings_instead_of_ids() -> None:
    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["unequal"])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with torch.no_grad(), vlmprune.prune(model, "divprune", keep=0.3):
        torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, model(**inputs).logits)


@several
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pruner", ["divprune", "staged"])
def test_static_cache(family: str, attention: str, pruner: str) -> None:
    """The same as on a dynamic cache: greedy, in beams, and when a cache is used again."""
    case = FAMILIES[family]
    model, inputs = model_of(case, attention), case.inputs(BATCHES[widest(case)])
    static = {"cache_implementation": "static", "disable_compile": True}
    for policy in case.positions:
        with vlmprune.prune(model, PRUNERS[pruner].make(positions=policy)):
            expected = generate(model, inputs)
            for _ in range(2):
                found = generate(model, inputs, **static)
                for mine, theirs in zip(found.logits, expected.logits):
                    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
            few = {"num_beams": 2, "max_new_tokens": 4, "output_scores": True}
            dynamic, beams = generate(model, inputs, **few), generate(model, inputs, **few, **static)
            torch.testing.assert_close(beams.sequences_scores, dynamic.sequences_scores, atol=1e-4, rtol=0)
            assert torch.equal(beams.sequences, dynamic.sequences)


def test_beam_search_inside_the_decoder() -> None:
    """Layers that hold different columns are reordered and cropped each for itself."""
    for policy in ("original", "compact"):
        model = model_of(LLAVA)
        with vlmprune.prune(model, PRUNERS["staged"].make(positions=policy)) as session:
            inputs = LLAVA.inputs([[1, 2, 3, 1, 2, ("image", 0), 3, 4, 1, 2, 3]])
            greedy = generate(model, inputs, max_new_tokens=12)
            lookup = generate(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
            assert torch.equal(greedy.sequences, lookup.sequences)

            beams = generate(model, inputs, num_beams=3, max_new_tokens=5, output_scores=True)
            searched = session.last
        answer = beams.sequences[:, inputs["input_ids"].shape[1] :]
        dropped = {layer: gone[:1] for layer, gone in dropped_of_first_row(searched, inputs).items()}
        _, scores = oracle.run(model, inputs, dropped, policy, 4, answer, {})
        total = sum(s.log_softmax(-1).gather(1, answer[:, i : i + 1])[0, 0] for i, s in enumerate(scores))
        torch.testing.assert_close(beams.sequences_scores[0], total / 5, atol=1e-4, rtol=0)


def dropped_of_first_row(report: Any, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
    """`dropped_of` after beam search: every beam of a prompt has kept the same."""
    beams = len(report.items)
    assert all(
        torch.equal(mine.kept, its.kept)
        for item in report.items[1:]
        for mine, its in zip(item.stages, report.items[0].stages)
    )
    return dropped_of(report, {"input_ids": inputs["input_ids"].expand(beams, -1)})


def test_a_cache_pruned_inside_the_decoder_needs_its_kind_of_session() -> None:
    model = model_of(LLAVA)
    cache = DynamicCache(config=model.config)
    with vlmprune.prune(model, PRUNERS["staged"].make()):
        first = generate(model, LLAVA.inputs(BATCHES["one"]), past_key_values=cache, max_new_tokens=3).sequences
    ids = torch.cat([first, torch.tensor([[5, 6]])], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with vlmprune.prune(model, "divprune", keep=0.3), pytest.raises(ValueError, match="inside the decoder"):
        generate(model, inputs, past_key_values=cache)


def test_a_session_whose_name_was_lost() -> None:
    model = LLAVA.model()
    assert vlmprune.session_of(model) is None
    vlmprune.prune(model, "divprune", keep=0.3)
    gc.collect()
    with pytest.raises(ValueError, match="session_of"):
        vlmprune.prune(model, "pool", keep=0.3)
    vlmprune.session_of(model).close()
    assert vlmprune.session_of(model) is None
    with vlmprune.prune(model, "pool", keep=0.3) as session:
        assert vlmprune.session_of(model) is session


@several
def test_assisted_decoding_with_a_draft_model(family: str) -> None:
    """A draft model proposes, the pruned model verifies: the same answer as without."""
    case = FAMILIES[family]
    model, inputs = model_of(case), case.inputs(BATCHES["one"])
    draft = case.model()
    for parameter in draft.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    for pruner in ("divprune", "staged"):
        for policy in case.positions:
            with vlmprune.prune(model, PRUNERS[pruner].make(positions=policy)):
                greedy = generate(model, inputs, max_new_tokens=16, suppress_tokens=None)
                assisted = generate(model, inputs, max_new_tokens=16, suppress_tokens=None, assistant_model=draft)
            assert torch.equal(greedy.sequences, assisted.sequences)
