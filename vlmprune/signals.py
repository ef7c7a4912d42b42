"""What pruners ask for beyond the features, computed when asked: attention rows, text, keys, changes on the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from vlmprune.adapters import Adapter
from vlmprune.contract import CORE, SIGNALS, Item, choosing
from vlmprune.course import Course
from vlmprune.kernels import attention_scores

if TYPE_CHECKING:
    from vlmprune.session import Live


HEADER = 5  # tokens of the longest "<|im_start|>assistant" and the like


class Entering(NamedTuple):
    """What enters a decoder layer: hidden states [B, P, D], (cos, sin), and which keys a row's last token will see."""

    layer: int
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    held: Tensor


def resolve(needs: frozenset[str], given: frozenset[str]) -> tuple[dict[str, str | None], list[str]]:
    """Of each entry of `needs`, which signal answers it (None: an optional one that is missing); and what is missing.

    Raises:
        ValueError: a name that is no signal.
    """
    answers: dict[str, str | None] = {}
    missing = []
    for need in sorted(needs):
        names = need.rstrip("?").split("|")
        for name in names:
            if name not in SIGNALS:
                raise ValueError(f"{name!r} is not a signal: vlmprune.contract.SIGNALS lists them.")
        answers[need] = next((name for name in names if name in given), None)
        if answers[need] is None and not need.endswith("?"):
            missing.append(" or ".join(names))
    return answers, missing


class Signals:
    """The signals of one session.

    Args:
        needs: the pruner's.
        accumulate: decoder layers over which "transition" is summed.
        stages: decoder layers before which the pruner chooses.
    """

    def __init__(
        self, adapter: Adapter, needs: frozenset[str], accumulate: Sequence[int], stages: Sequence[int]
    ) -> None:
        self.adapter = adapter
        self.answers, self.missing = resolve(needs, adapter.signals)
        self.wanted = frozenset(name for name in self.answers.values() if name)
        self._accumulate, self._stages = accumulate, stages
        self.course: Course | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the call."""
        self.ids: Tensor | None = None  # [B, S] on the CPU
        self.embeds: Tensor | None = None
        self.before: Entering | None = None
        self.here: Entering | None = None
        self._layer_keys: tuple[Entering, Tensor] | None = None
        self._changes: dict[str, Tensor] = {}
        self._overlaps: dict[str, Tensor] = {}
        self.course = None
        self.all_items: Sequence[Item] = ()
        self.all_shown: Tensor | None = None
        self.replies: Tensor | None = None

    def begin(
        self,
        course: Course,
        embeds: Tensor,
        ids: Tensor | None,
        items: Sequence[Item],
        shown: Tensor | None,
        replies: Tensor | None = None,
    ) -> None:
        """A prompt with images enters the language model.

        Args:
            embeds: [B, S, D], its input.
            ids: int64 [B, S], on the CPU.
            items: where they are in it.
            shown: bool [B, S], on the CPU, False for padding.
            replies: bool [B, S], on the CPU, what the model is trained to say. No signal reads it: methods would choose
                by what is not there in use.
        """
        self.course, self.ids, self.all_items, self.all_shown, self.replies = course, ids, items, shown, replies
        if self.wanted & {"instruction", "instruction_queries", "instruction_keys", "prompt_features", "text_features"}:
            self.embeds = embeds

    def move(self, device: torch.device) -> None:
        """Go on with the layers of another device."""
        self.embeds = None if self.embeds is None else self.embeds.to(device)
        for tables in (self._changes, self._overlaps):
            tables.update({name: table.to(device) for name, table in tables.items()})
        if self.before is not None:
            layer, hidden, (cos, sin), held = self.before
            self.before = Entering(layer, hidden.to(device), (cos.to(device), sin.to(device)), held.to(device))

    @property
    def wants_before(self) -> bool:
        return bool(self.wanted & {"last_attention", "text_attention", "all_attention", "visual_attention"})

    @property
    def wants_question(self) -> bool:
        return bool(self.wanted & {"instruction", "instruction_mask", "instruction_queries", "activation_overlap"})

    @property
    def wants_here(self) -> bool:
        return any(name.startswith("next_") for name in self.wanted)

    def watch(self) -> list[Any]:
        """Put on the hooks that the signals need; handles to remove them."""
        handles = self.adapter.watch(self.wanted)
        layers: Sequence[Any] = self.adapter.decoder_layers
        if self.wanted & {"transition", "transition_strict"}:
            for number in self._accumulate:
                for block in (layers[number].self_attn, layers[number].mlp):
                    handles.append(block.register_forward_hook(self._after_block, with_kwargs=True))
        if self.wanted & {"activation_overlap", "core_overlap"}:
            for stage in self._stages:
                if stage:
                    down = layers[stage - 1].mlp.down_proj
                    handles.append(down.register_forward_pre_hook(self._before_down))
        return handles

    def cut(self, gather: Any) -> None:
        """Follow a cut of the sequence."""
        self._changes = {name: gather(table) for name, table in self._changes.items()}
        self._overlaps = {}
        self.passed()

    def passed(self) -> None:
        """A stage is done with."""
        self.before = self.here = self._layer_keys = None

    def _after_block(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """TransPrune (arXiv 2507.20630): (|y| / |x|) softmax of 1 - cos(x, y), as the code or the paper has it."""
        if self.course is None:
            return
        x = (args[0] if args else kwargs["hidden_states"]).float()
        y = (output[0] if isinstance(output, tuple) else output).float()
        cosine = cosine_similarity(x, y, dim=-1)
        ratio = y.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)
        if "transition" in self.wanted:
            shown = self._prompt(self.course).to(x.device, non_blocking=True)
            self._change("transition", ratio * (1 - cosine).masked_fill(~shown, -torch.inf).softmax(dim=1))
        if "transition_strict" in self.wanted:
            self._change("transition_strict", ratio * self._softmax_by_item(1 - cosine.abs(), self.course))

    def _change(self, name: str, more: Tensor) -> None:
        self._changes[name] = self._changes[name].to(more.device) + more if name in self._changes else more

    def _softmax_by_item(self, values: Tensor, course: Course) -> Tensor:
        """Values [B, P] in [0, 1], a softmax over each item's tokens; 0 elsewhere."""
        number = torch.zeros(course.batch, course.length, dtype=torch.int64, device="cpu")
        for place, item in enumerate(self.all_items, 1):
            number[item.sample, item.where] = place
        number = number.to(values.device, non_blocking=True)
        if course.columns is not None:
            columns = course.columns.to(values.device)
            number = number.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0)
        power = values.exp() * (number > 0)
        total = power.new_zeros(len(self.all_items) + 1).scatter_add(0, number.flatten(), power.flatten())
        return power / total[number].clamp(min=1e-12)

    def _before_down(self, module: nn.Module, args: Any) -> None:
        if self.course is None:
            return
        if "core_overlap" in self.wanted:
            shown = self._prompt(self.course).to(args[0].device, non_blocking=True)
            self._overlaps["core_overlap"] = core_overlap(args[0], shown)
        if "activation_overlap" in self.wanted:
            active = (args[0] > 0).float()
            last = self._place(self.course, self._last_words(self.course)).to(active.device)
            word = active[torch.arange(len(active), device=active.device), last]
            with choosing():
                self._overlaps["activation_overlap"] = (active @ word[..., None])[..., 0]

    def read(self, need: str, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Any:
        """A signal for the items `live`, out of `everything` in the sequence; None for a missing optional one."""
        if need not in self.answers:
            raise KeyError(f"the signal {need!r} was not asked for: name it in the pruner's `needs`")
        name = self.answers[need]
        if name is None:
            return None
        if name in _MADE:
            return _MADE[name](self, live, everything, course)
        per_picture = name in ("cls_features", "cls_keys")
        tables = [self.adapter.encoded(name, each.origin).to(course.device) for each in live]
        if not per_picture:
            tables = [table[each.index] for table, each in zip(tables, live)]
        return pad_sequence(tables, batch_first=True)

    def project(self, rows: Tensor) -> Tensor:
        """The model's projector."""
        if "projector_inputs" not in self.wanted:
            raise KeyError('projecting was not asked for: name "projector_inputs" in the pruner\'s `needs`')
        return self.adapter.project(rows).to(rows.device)

    # Text.

    def _prompt(self, course: Course) -> Tensor:
        """bool [B, P], on the CPU: what of the sequence as it is now is prompt, no padding and no answer."""
        shown = course.host_shown()
        if self.replies is None:
            return shown
        replies = self.replies
        if course.columns is not None:
            replies = replies.gather(1, course.columns.clamp(min=0).cpu())
        return shown & ~replies

    def _text_columns(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> list[Tensor]:
        """Per item, positions (int64, on the CPU) of the text behind it in the sequence as it is now."""
        shown = self._prompt(course)
        out = []
        for each in live:
            row = shown[each.item.sample].clone()
            row[: each.item.stop] = False
            for other in everything:
                if other.item.sample == each.item.sample and other.item.length:
                    row[other.item.start : other.item.stop] = False
            out.append(row.nonzero().flatten())
        return out

    def _instructions(self, course: Course) -> list[Tensor]:
        """`question_columns` of the call."""
        shown = (
            torch.ones(course.batch, course.length, dtype=torch.bool, device="cpu")
            if self.all_shown is None
            else self.all_shown
        )
        if self.replies is not None:
            shown = shown & ~self.replies
        return question_columns(self.adapter, self.ids, self.all_items, shown)

    def _last_words(self, course: Course) -> Tensor:
        """int64 [B], on the CPU: column of the last token of each row's question."""
        return torch.tensor(
            [int(columns[-1]) if len(columns) else 0 for columns in self._instructions(course)], device="cpu"
        )

    def _place(self, course: Course, column: Tensor) -> Tensor:
        """Where these columns (int64 [B]) are in the sequence as it is now."""
        column = column.to(course.device, non_blocking=True)
        return column if course.columns is None else (course.columns == column[:, None]).int().argmax(1)

    def _instruction(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        assert self.embeds is not None
        columns = self._instructions(course)
        return pad_sequence(
            [self.embeds[e.item.sample, columns[e.item.sample].to(self.embeds.device)] for e in live], batch_first=True
        )

    def _instruction_mask(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        columns = self._instructions(course)
        return _filled([len(columns[each.item.sample]) for each in live]).to(course.device, non_blocking=True)

    def _instruction_queries(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        return self._unrotated(self.adapter.queries, self._instruction(live, everything, course))

    def _instruction_keys(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        assert self.embeds is not None
        rows = [self.embeds[e.origin.sample, e.origin.where][e.index] for e in live]
        return self._unrotated(self.adapter.keys, pad_sequence(rows, batch_first=True))

    def _unrotated(self, part: Callable[..., Tensor], rows: Tensor) -> Tensor:
        """Queries [I, S, H, d] or keys [I, S, G, d] of rows [I, S, D] in the last decoder layer, without RoPE."""
        return part(self.adapter.decoder_layers[-1], rows, None).transpose(1, 2)

    def _prompt_features(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        assert self.embeds is not None
        return pad_sequence([self.embeds[e.origin.sample, e.origin.where] for e in live], batch_first=True)

    def _text_features(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        assert self.embeds is not None
        rows = []
        for each, places in zip(live, self._text_columns(live, everything, course)):
            places = places.to(course.device, non_blocking=True)
            columns = places if course.columns is None else course.columns[each.item.sample, places]
            rows.append(self.embeds[each.item.sample, columns])
        return pad_sequence(rows, batch_first=True)

    def _text_mask(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        columns = self._text_columns(live, everything, course)
        return _filled([len(each) for each in columns]).to(course.device, non_blocking=True)

    # Attention.

    def _keys(self, point: Entering, course: Course) -> Tensor:
        """Keys [B, G, H + P, d] that the layer sees; made once a stage."""
        if self._layer_keys is None or self._layer_keys[0] is not point:
            self._layer_keys = point, self._make_keys(point, course)
        return self._layer_keys[1]

    def _make_keys(self, point: Entering, course: Course) -> Tensor:
        layer = self.adapter.decoder_layers[point.layer]
        total, now = point.held.shape[1], point.hidden.shape[1]
        layers = getattr(course.cache, "layers", None) or ()
        held = layers[point.layer].keys if point.layer < len(layers) else None
        if point is self.before and held is not None and held.shape[2] >= total:
            return held[:, :, :total].to(point.hidden.device)
        # No cache, a sliding window that forgets, or a layer that has yet to run.
        keys = self.adapter.keys(layer, point.hidden, _wide(point))
        if total == now:
            return keys
        if held is None or held.shape[2] < total - now:
            raise ValueError("the sliding window has dropped keys of earlier turns: start a new conversation")
        return torch.cat([held[:, :, : total - now].to(keys), keys], dim=2)

    def _point(self, following: bool, name: str) -> Entering:
        point = self.here if following else self.before
        if point is None:
            raise ValueError(f"there is no {name} before the first decoder layer: ask at a later stage")
        return point

    def _queries(self, point: Entering, row: Tensor, place: Tensor) -> Tensor:
        """Queries [R, H, T, d] of positions `place` [R, T] in rows `row` [R]."""
        cos, sin = (part[row[:, None], place] for part in _wide(point))
        hidden = point.hidden[row[:, None], place]
        layer = self.adapter.decoder_layers[point.layer]
        return self.adapter.queries(layer, hidden, (cos, sin))

    def _last_attention(
        self, live: Sequence[Live], everything: Sequence[Live], course: Course, *, following: bool
    ) -> Tensor:
        point = self._point(following, "last_attention")
        shown = self._prompt(course)
        last = torch.where(shown, torch.arange(shown.shape[1], device="cpu"), -1).amax(dim=1).to(point.hidden.device)
        row = torch.arange(len(point.hidden), device=point.hidden.device)
        query = self._queries(point, row, last[:, None])
        keys, held = self._keys(point, course), point.held
        if self.replies is not None:  # which stand behind it
            place = torch.arange(held.shape[1], device=held.device) - (held.shape[1] - point.hidden.shape[1])
            held = held & (place <= last[:, None])
        scores = attention_scores(query, keys, mask=held, reduce="rows")[:, 0, -point.hidden.shape[1] :]
        return pad_sequence([scores[e.item.sample, e.item.where] for e in live], batch_first=True)

    def _text_attention(
        self, live: Sequence[Live], everything: Sequence[Live], course: Course, *, following: bool
    ) -> Tensor:
        point = self._point(following, "text_attention")
        places = self._text_columns(live, everything, course)
        longest, widest = max(map(len, places)), max(each.item.length for each in live)
        out = point.hidden.new_zeros(len(live), longest, widest, dtype=torch.float32)
        keys, past = self._keys(point, course), point.held.shape[1] - point.hidden.shape[1]
        for number, (each, place) in enumerate(zip(live, places)):
            if len(place):
                scores = self._rows(point, keys, past, each, place.to(keys.device, non_blocking=True), "rows")
                out[number, : len(place), : each.item.length] = scores[:, each.item.where]
        return out

    def _all_attention(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        point = self._point(False, "all_attention")
        keys, past = self._keys(point, course), point.held.shape[1] - point.hidden.shape[1]
        shown, made = self._prompt(course), dict[int, Tensor]()
        for each in live:
            if (sample := each.item.sample) not in made:
                place = shown[sample].nonzero().flatten().to(keys.device, non_blocking=True)
                total = self._rows(point, keys, past, each, place, "sum")
                seen_by = shown[sample].flip(0).cumsum(0).flip(0).clamp(min=1)
                made[sample] = total / seen_by.to(keys.device, non_blocking=True)
        return pad_sequence([made[e.item.sample][e.item.where] for e in live], batch_first=True)

    def _inner_attention(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        point = self._point(True, "next_inner_attention")
        keys = self._keys(point, course)[:, :, -point.hidden.shape[1] :]
        rows = []
        for each in live:
            place = _places(each.item).to(keys.device, non_blocking=True)
            query = self._queries(point, torch.tensor([each.item.sample], device=keys.device), place[None])
            own = keys[each.item.sample : each.item.sample + 1, :, place]
            rows.append(attention_scores(query, own, causal=True)[0])
        return pad_sequence(rows, batch_first=True)

    def _visual_attention(
        self, live: Sequence[Live], everything: Sequence[Live], course: Course, *, following: bool
    ) -> Tensor:
        point = self._point(following, "visual_attention")
        keys, past = self._keys(point, course), point.held.shape[1] - point.hidden.shape[1]
        rows = []
        for each in live:
            place = _places(each.item).to(keys.device, non_blocking=True)
            rows.append(self._rows(point, keys, past, each, place, "sum")[each.item.where])
        return pad_sequence(rows, batch_first=True)

    def _rows(self, point: Entering, keys: Tensor, past: int, live: Live, place: Tensor, reduce: Any) -> Tensor:
        """Attention of positions `place` [T] of an item's row, [P] or [T, P] over the positions of this call."""
        sample = live.item.sample
        query = self._queries(point, torch.tensor([sample], device=keys.device), place[None])
        scores = attention_scores(
            query,
            keys[sample : sample + 1],
            mask=point.held[sample : sample + 1],
            causal=True,
            query_index=place[None] + past,
            reduce=reduce,
        )
        return scores[0, ..., past:]

    def _next_keys(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        point = self._point(True, "next_keys")
        mean = self._keys(point, course)[:, :, -point.hidden.shape[1] :].float().mean(1)
        return pad_sequence([mean[e.item.sample, e.item.where] for e in live], batch_first=True)

    def _next_plain_keys(self, live: Sequence[Live], everything: Sequence[Live], course: Course) -> Tensor:
        point = self._point(True, "next_plain_keys")
        cos, sin = _wide(point)
        layer = self.adapter.decoder_layers[point.layer]
        keys = self.adapter.keys(layer, point.hidden, (torch.ones_like(cos), torch.zeros_like(sin)))
        mean = keys.float().mean(1)
        return pad_sequence([mean[e.item.sample, e.item.where] for e in live], batch_first=True)

    def _per_position(self, live: Sequence[Live], everything: Sequence[Live], course: Course, *, name: str) -> Tensor:
        table = {**self._changes, **self._overlaps}.get(name)
        if table is None:
            raise ValueError(f"there is no {name} before a decoder layer has run: ask at a later stage")
        return pad_sequence([table[e.item.sample, e.item.where] for e in live], batch_first=True)


_MADE: dict[str, Any] = {
    "instruction": Signals._instruction,
    "instruction_mask": Signals._instruction_mask,
    "instruction_queries": Signals._instruction_queries,
    "instruction_keys": Signals._instruction_keys,
    "prompt_features": Signals._prompt_features,
    "text_features": Signals._text_features,
    "text_mask": Signals._text_mask,
    "last_attention": functools.partial(Signals._last_attention, following=False),
    "next_last_attention": functools.partial(Signals._last_attention, following=True),
    "text_attention": functools.partial(Signals._text_attention, following=False),
    "next_text_attention": functools.partial(Signals._text_attention, following=True),
    "all_attention": Signals._all_attention,
    "next_inner_attention": Signals._inner_attention,
    "visual_attention": functools.partial(Signals._visual_attention, following=False),
    "next_visual_attention": functools.partial(Signals._visual_attention, following=True),
    "next_keys": Signals._next_keys,
    "next_plain_keys": Signals._next_plain_keys,
    **{
        name: functools.partial(Signals._per_position, name=name)
        for name in ("transition", "transition_strict", "activation_overlap", "core_overlap")
    },
}


def core_overlap(activations: Tensor, shown: Tensor) -> Tensor:
    """fp32 [B, S]: positive neurons of each token that are core to its prompt, CoreMatching's paper (arXiv 2505.19235).

    A token's core are the `CORE` of its positive neurons with the largest activations (rounded up); the prompt's, the
    `CORE` of all neurons that are in most tokens' cores, lower index first in a tie.

    Args:
        activations: [B, S, F], what enters `down_proj`.
        shown: bool [B, S], False for padding.
    """
    positive = activations > 0
    share = (positive.sum(2) * CORE).ceil().long()
    ranked = activations.float().sort(dim=2, descending=True).values
    least = ranked.gather(2, (share - 1).clamp(min=0)[..., None])
    own = positive & (activations.float() >= least) & shown[..., None]
    often = own.sum(1).sort(dim=1, descending=True, stable=True).indices
    core = torch.zeros_like(own[:, 0]).scatter(1, often[:, : math.ceil(CORE * own.shape[2])], True)
    return (positive & core[:, None]).sum(2).float()


def _places(item: Item) -> Tensor:
    """int64 [N]: positions of an item's tokens."""
    where = item.where
    return torch.arange(where.start, where.stop, device="cpu") if isinstance(where, slice) else where


def question_columns(adapter: Adapter, ids: Tensor | None, items: Sequence[Item], shown: Tensor) -> list[Tensor]:
    """Per row, columns (int64, on the CPU) of the question.

    That is the user's last turn, without images and, if any is left, without what stands before them. Turns end with an
    end-of-sequence token, as chat templates have it; at most `HEADER` tokens without an image behind the last one are
    the head of the answer to come.

    Args:
        ids: int64 [B, S], on the CPU; None: turns cannot be told apart.
        items: where the images are.
        shown: bool [B, S], on the CPU, False for padding.
    """
    config = getattr(adapter.model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ends = adapter.text_config.eos_token_id if ends is None else ends
    ends = torch.tensor([] if ends is None else [ends] if isinstance(ends, int) else list(ends), device="cpu")
    out = []
    for row, visible in enumerate(shown):
        own = [item for item in items if item.sample == row]
        text = visible.clone()
        for item in own:
            text[item.start : item.stop] = False
        columns = text.nonzero().flatten()
        first, stop = 0, shown.shape[1]
        marks = [] if ids is None else (torch.isin(ids[row], ends) & text).nonzero().flatten().tolist()
        if marks:
            first = marks[-1] + 1
            answer = all(item.stop <= first for item in own) and (columns >= first).sum() <= HEADER
            if answer:
                first, stop = marks[-2] + 1 if len(marks) > 1 else 0, marks[-1]
        behind = max([item.stop for item in own if item.stop <= stop], default=0)
        turn = columns[(columns >= max(first, behind)) & (columns < stop)]
        out.append(turn if len(turn) else columns[(columns >= first) & (columns < stop)])
    return out


def _wide(point: Entering) -> tuple[Tensor, Tensor]:
    cos, sin = (part.expand(len(point.hidden), -1, -1) for part in point.rotary)
    return cos, sin


def _filled(lengths: Sequence[int]) -> Tensor:
    """bool [I, longest]: the first so many of each row."""
    return torch.arange(max(lengths, default=0), device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
