"""The table of methods: one source for `vlmprune methods` and for the README.

`python -m vlmprune.methods_table` tries every method on a weightless model of every family, writes `methods.json` and
the README's block anew; with `--check` it only says whether they are up to date.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmprune.contract import Pruner
    from vlmprune.pruners._before_tower import FrameSelector

DATA = Path(__file__).parent / "methods.json"
BEGIN, END = "<!-- methods: made by python -m vlmprune.methods_table -->", "<!-- end of methods -->"

LEFT_OUT: tuple[tuple[str, str, str], ...] = (
    (
        "p-MoD",
        "arXiv 2412.04449",
        "its routers send tokens around layers instead of dropping them and are trained together with the whole "
        "language model, so there is nothing to plug into an unmodified one",
    ),
    (
        "YOPO's attention windows, head masks and narrowed FFN",
        "arXiv 2410.06169",
        "they cut computation on tokens that all stay, by masking; its layer cut is `yopo`",
    ),
    (
        "CoreMatching's sparse neurons",
        "arXiv 2505.19235",
        "they cut the FFN of the language model, not visual tokens",
    ),
    (
        "HICom's released checkpoint",
        "arXiv 2503.16036",
        "its language model, vision tower, pooling head and text tower were fine-tuned together with the compressor, "
        "so its weights cannot be attached to an unmodified model; `hicom` has the modules, and a trainer for them, "
        "behind a frozen model's projector",
    ),
    (
        "VQToken's released checkpoint",
        "arXiv 2503.16980",
        "its vision tower, projector and 0.5B language model were fine-tuned together with VQ-Attention, which the "
        "released evaluation does not even run; `vqtoken` has the module and a trainer for it",
    ),
)
"""Methods, or halves of them, that are not here: name, paper, why."""


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        families: names of `vlmprune.adapters` whose models give every signal it needs; None: not tried (a plug-in).
    """

    name: str
    stage: str
    query_aware: bool
    trained: bool
    families: tuple[str, ...] | None
    paper: str
    summary: str
    settings: tuple[str, ...]

    @classmethod
    def of(cls, pruner: type[Pruner] | type[FrameSelector], families: dict[str, Any]) -> Method:
        about = " ".join((pruner.__doc__ or "").split("\n\n")[0].split())
        fields = tuple(f"{item.name}={_shown(item.default)}" for item in dataclasses.fields(pruner) if item.init)
        return cls(
            pruner.name,
            pruner.stage,
            pruner.query_aware,
            pruner.trained,
            tuple(families["families"]) if pruner.stage == "frames" else _but(families, pruner.name),
            pruner.paper,
            about,
            fields,
        )

    @property
    def where(self) -> str:
        """The families, in words."""
        if self.families is None:
            return "not tried"
        missing = [name for name in _data()["families"] if name not in self.families]
        if not missing:
            return "all"
        return f"all but {', '.join(missing)}" if len(missing) <= len(self.families) else ", ".join(self.families)


def _shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "..."
    return str(round(default, 6) if isinstance(default, float) else default)


def _but(data: dict[str, Any], name: str) -> tuple[str, ...] | None:
    lacking = data["lacking"].get(name, [])
    return tuple(family for family in data["families"] if family not in lacking) if name in data["tried"] else None


def _data() -> dict[str, Any]:
    return json.loads(DATA.read_text(encoding="utf-8"))


def methods() -> list[Method]:
    """Every registered method and every frame selector, by name."""
    from vlmprune.registry import frame_selectors, pruner_classes

    classes: dict[str, Any] = {**pruner_classes(), **frame_selectors()}
    return [Method.of(classes[name], _data()) for name in sorted(classes)]


def wrappers() -> list[Method]:
    """What makes methods out of others."""
    import vlmprune.pruners

    classes = (getattr(vlmprune.pruners, name) for name in vlmprune.pruners.__all__)
    return [Method.of(cls, _data()) for cls in classes if cls.paper == "wrapper"]


def markdown() -> str:
    """The README's table, with its markers."""
    lines = [
        BEGIN,
        "| method | acts at | query-aware | trained | families | what it does | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods():
        lines.append(
            f"| `{method.name}` | {method.stage} | {'yes' if method.query_aware else ''} | "
            f"{'yes' if method.trained else ''} | {method.where} | {method.summary.rstrip('.')} | {method.paper} |"
        )
    lines += ["", "Made of other methods:", *(f"- `{each.name}`: {each.summary}" for each in wrappers())]
    lines += ["", "Left out:", *(f"- {name} ({paper}): {why}." for name, paper, why in LEFT_OUT), END]
    return "\n".join(lines)


def _weightless() -> dict[str, Any]:
    """By name, an adapter for a model without weights, of every family's default configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlmprune.adapters import FAMILIES, adapter_for

    made: dict[str, Any] = {}
    for family in FAMILIES:
        kind = family.model_types[0]
        variants = {family.family: AutoConfig.for_model(kind)}
        if kind == "llava":
            siglip = {"model_type": "siglip_vision_model", "image_size": 336, "patch_size": 14}
            variants[f"{family.family} with SigLIP"] = AutoConfig.for_model(kind, vision_config=siglip)
        for name, config in variants.items():
            with torch.device("meta"):
                made[name] = adapter_for(AutoModelForImageTextToText.from_config(config))
    return made


def tried() -> dict[str, Any]:
    """Which families give each method's signals, found by asking their adapters."""
    from vlmprune.registry import pruner_classes
    from vlmprune.signals import resolve

    adapters = _weightless()
    lacking: dict[str, list[str]] = {}
    names = []
    for name, cls in pruner_classes().items():
        if not cls.__module__.startswith("vlmprune."):
            continue
        try:
            needs = cls().needs
        except (ValueError, TypeError):  # takes weights, or a file: its needs by its fields' defaults
            needs = object.__new__(cls).needs
        names.append(name)
        if missing := [family for family, adapter in adapters.items() if resolve(needs, adapter.signals)[1]]:
            lacking[name] = missing
    return {"families": list(adapters), "tried": names, "lacking": lacking}


def main(arguments: list[str]) -> int:
    readme = Path(__file__).parents[1] / "README.md"
    data = json.dumps(tried(), indent=1) + "\n"
    before = DATA.read_text(encoding="utf-8") if DATA.exists() else ""
    if "--check" not in arguments:
        DATA.write_text(data, encoding="utf-8")
    text = readme.read_text(encoding="utf-8")
    start, stop = text.index(BEGIN), text.index(END) + len(END)
    if "--check" in arguments:
        fresh = before == data and text[start:stop] == markdown()
        print("up to date" if fresh else "out of date: run python -m vlmprune.methods_table")
        return 0 if fresh else 1
    readme.write_text(text[:start] + markdown() + text[stop:], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
