"""Weights of methods that are trained: a folder with `config.json` and `model.safetensors`, or part of a checkpoint."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vlmprune.contract import VisualTokens

M = TypeVar("M", bound=nn.Module)


def save_module(module: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32, **config: Any) -> None:
    """Write a module's weights in `dtype`, and `config`, which names the `method` and what builds the module again."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in module.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def trained_module(method: str, kind: type[M], weights: str | Path | M | None, source: str, instead: str) -> M:
    """What a pruner was given as `weights`: the module itself, or the one that `kind.load` reads from a folder.

    A folder is read once for as long as its files stay as they are.

    Args:
        source: what such folders come from, for the error.
        instead: method to use without weights, for the error.

    Raises:
        ValueError: nothing, something else, or a folder that cannot be read.
    """
    if isinstance(weights, kind):
        return weights
    if weights is None:
        raise ValueError(f"{method} needs trained weights: give weights= a folder that {source}, or use {instead}")
    if not isinstance(weights, str | Path):
        raise ValueError(f"{method} takes as weights= a folder or a {kind.__name__}, got a {type(weights).__name__}")
    files = (Path(weights) / name for name in ("config.json", "model.safetensors"))
    written = tuple(file.stat().st_mtime_ns for file in files if file.exists())
    return _read(kind, str(weights), written)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=2)
def _read(kind: Any, folder: str, written: tuple[int, ...]) -> Any:
    return kind.load(folder)


def products(*modules: nn.Module) -> int:
    """FLOPs of one row through all of the modules' weights."""
    return 2 * sum(weight.numel() for each in modules for weight in each.parameters() if weight.dim() > 1)


def load_module(folder: str | Path, method: str, script: str, build: Callable[[dict[str, Any]], M]) -> M:
    """Read what `save_module` wrote, on the CPU, in fp32 and in evaluation mode.

    Args:
        script: what writes such folders, for the error.
        build: the module of a config.

    Raises:
        ValueError: no such folder, weights of another method, or weights that do not fit their config.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("method") != method:
            raise ValueError(f"these are weights of {config.get('method')!r}, not of {method!r}")
        module = build(config)
        module.load_state_dict(load_file(folder / "model.safetensors"))
        module.made_for = config.get("model")
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())  # PyTorch's take several lines
        raise ValueError(
            f"weights {str(folder)!r} are not a folder that {script} wrote (config.json and model.safetensors): {why}"
        ) from error
    return module.eval().requires_grad_(False)


def check_made_for(method: str, script: str, module: nn.Module, config: Any) -> None:
    """Raise ValueError, with one sentence, where a module that was read from a folder was trained for another kind of
    model: tokens of another one of the same width would be chosen, and chosen badly, without a word."""
    kind = (getattr(module, "made_for", None) or {}).get("model_type")
    if kind not in (None, config.model_type):
        raise ValueError(
            f"these weights of {method} are for a model of type {kind!r}, this one is a {config.model_type!r}: train "
            f"others with {script}"
        )


def check_width(method: str, script: str, hidden: int, tokens: VisualTokens) -> None:
    """Raise ValueError, with one sentence, where modules for rows of width `hidden` meet others."""
    width = tokens.features.shape[-1]
    if width != hidden:
        raise ValueError(
            f"these weights of {method} are for a language model of width {hidden}, this one has {width}: train others "
            f"with {script}"
        )


def load_part(folder: str | Path, prefix: str, module: M) -> M:
    """Fill `module` (made on the meta device) from a checkpoint that transformers saved, in the dtype stored.

    Of the shards named by `model.safetensors.index.json`, or of `model.safetensors`, only the tensors that `module` has
    are read: those of its names behind `prefix`.

    Raises:
        ValueError: no such files, or a tensor that is missing, has another shape, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    folder, what = Path(folder), f"checkpoint {str(folder)!r}"
    wanted = {prefix + name: value for name, value in module.state_dict().items()}
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                shards = dict.fromkeys(file.keys(), "model.safetensors")
        if missing := sorted(set(wanted) - set(shards)):
            raise ValueError(f"{what} lacks {missing[0]!r}{f' and {len(missing) - 1} more' * (len(missing) > 1)}")
        found: dict[str, torch.Tensor] = {}
        for shard in sorted({shards[name] for name in wanted}):
            with safe_open(folder / Path(shard).name, "pt") as file:
                for name in wanted:
                    if shards[name] == shard:
                        found[name] = file.get_tensor(name)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be read: {error}") from error
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"{what} has {name!r} of shape {list(found[name].shape)}, where its config.json asks for "
                f"{list(value.shape)}"
            )
    module.load_state_dict({name.removeprefix(prefix): value for name, value in found.items()}, assign=True)
    return module.eval().requires_grad_(False)
