"""Every mode of generate() against the oracle: the same call under it, or its logits for the tokens that came out."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
from cases import KINDS, PRUNERS
from families import FAMILIES, SPECIAL
from test_laws import dropped_of, generate, model_of

import vlmprune

STEPS = 6
PROMPTS = {
    "one": [[1, 2, 3, 1, 2, ("image", 0), 3, 4, 1, 2, 3]],
    "two": [[1, 2, ("image", 0), 3, 4, 5], [4, ("image", 2), 3, 3]],
}
UNDER_ORACLE = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.5, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "output_scores": True},
    "sampled beams": {"num_beams": 2, "do_sample": True, "top_k": 0, "output_scores": True},
}
"""Options of generate() that need no cache."""
IN_BEAMS = {
    "one": [[1, 2, 3, 1, 2, ("image", 1), 3, 4, 1, 2, 3]],
    "two": [[1, 2, ("image", 1), 3, 4], [4, ("image", 1), 3]],
}
"""Up to transformers 5.17 the tiles of one prompt are repeated one by one: A A B B for two rows A B. These have one."""
SCORED = {
    "static cache": ({"cache_implementation": "static", "disable_compile": True}, ("one", "two")),
    "no cache": ({"use_cache": False}, ("two",)),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, ("one",)),
    "draft model": ({"assistant_model": "draft"}, ("one",)),
}
"""Options whose answer must be the oracle's greedy one, and the prompts that transformers takes with them."""

PLACES = [
    (name, policy, pruner)
    for name in ("llava-clip-llama", "qwen2.5-vl", "internvl")
    for policy in FAMILIES[name].positions
    for pruner in KINDS
]


def calls() -> Any:
    """(family, positions, pruner, mode, batch): one prompt alone with one method in all but the greedy mode."""
    for place in PLACES:
        for mode in ("greedy", "sampling", "beams"):
            for batch in PROMPTS if mode == "greedy" or place[2] == "compose" else ("two",):
                yield pytest.param(*place, mode, batch, id="-".join((*place, mode, batch)))
    yield pytest.param("qwen2.5-vl", "original", "compose", "sampled beams", "two", id="sampled beams")


def cached_calls() -> Any:
    """The same of the modes that live on a cache; but for the static, the boundary alone: tests/test_generation.py."""
    for place in PLACES:
        for mode, (_, batches) in SCORED.items():
            for batch in batches if place[2] != "divprune" or mode == "static cache" else ():
                yield pytest.param(*place, mode, batch, id="-".join((*place, mode, batch)))


@pytest.mark.parametrize(("name", "policy", "pruner", "mode", "batch"), calls())
def test_the_same_call_under_the_oracle(name: str, policy: str, pruner: str, mode: str, batch: str) -> None:
    family, options = FAMILIES[name], UNDER_ORACLE[mode]
    model = model_of(family)
    whole = hasattr(model, "_expand_multimodal_outputs") or "compact" not in family.positions
    inputs = family.inputs((PROMPTS if whole or "num_beams" not in options else IN_BEAMS)[batch])
    torch.manual_seed(5)
    with vlmprune.prune(model, PRUNERS[pruner].make(positions=policy)) as session:
        out = generate(model, inputs, max_new_tokens=STEPS, **options)
    rows = options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    dropped = dropped_of(session.last, {"input_ids": inputs["input_ids"].repeat_interleave(rows, 0)})
    assert dropped[max(dropped)].any(1).all(), "every row lost something"
    torch.manual_seed(5)
    true = oracle.generate(
        model,
        inputs,
        dropped,
        policy,
        max_new_tokens=STEPS,
        suppress_tokens=SPECIAL,
        output_logits=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **options},
    )
    assert torch.equal(out.sequences, true.sequences)
    for mine, theirs in zip(out.logits, true.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    if "num_beams" in options:
        torch.testing.assert_close(out.sequences_scores, true.sequences_scores, atol=1e-4, rtol=0)


@functools.cache
def draft_of(name: str) -> Any:
    """A model that says nearly the same."""
    draft = FAMILIES[name].model()
    for parameter in draft.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return draft


@pytest.mark.parametrize(("name", "policy", "pruner", "mode", "batch"), cached_calls())
def test_the_tokens_are_the_oracles(name: str, policy: str, pruner: str, mode: str, batch: str) -> None:
    """Modes that live on a cache, or verify several tokens at once and crop what they reject."""
    family = FAMILIES[name]
    model, inputs, options = model_of(family), family.inputs(PROMPTS[batch]), dict(SCORED[mode][0])
    if "assistant_model" in options:
        options["assistant_model"] = draft_of(name)
    steps = 9 if mode in ("prompt lookup", "draft model") else STEPS
    with vlmprune.prune(model, PRUNERS[pruner].make(positions=policy)) as session:
        out = generate(model, inputs, max_new_tokens=steps, **options)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    dropped = dropped_of(session.last, inputs)
    assert dropped[max(dropped)].any(1).all()
    _, scores = oracle.run(model, inputs, dropped, policy, steps - 1, answer, {})
    assert answer.shape[1] == len(out.logits) == steps
    for step, (mine, theirs) in enumerate(zip(out.logits, scores, strict=True)):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
        allowed = theirs.index_fill(1, torch.tensor(SPECIAL), -torch.inf)
        assert torch.equal(allowed.argmax(1), answer[:, step])
