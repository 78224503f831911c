"""One request on one model: prefill in chunks, tree steps, and what of them stays."""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from specvlm.core.errors import ConfigError
from specvlm.core.rows import Rows
from specvlm.core.tree import MAX_NODES
from specvlm.core.upload import upload
from specvlm.families import Prompt
from specvlm.kernels.linear import linear
from specvlm.kernels.tree_attention import tree_attention
from specvlm.runtime import attention
from specvlm.runtime.decoder import Decoder, Weight
from specvlm.runtime.graphs import Workspaces, on
from specvlm.runtime.kv import KVCache

T = TypeVar("T")
PREFILL_ROWS = 17 << 10  # rows of one chunk of a prefill: enough for full speed, few enough for its activations


class Served(Protocol):
    """What a session takes of a model."""

    hf: Any  # the Hugging Face model
    decoder: Decoder | None  # its fused layers
    head: Weight  # [vocab, D]
    device: torch.device
    dtype: torch.dtype
    kv_shape: tuple[int, int, int]  # layers, KV heads, head width
    workspaces: Workspaces

    @property
    def step_bytes(self) -> int:
        """The bytes of weights that one step reads."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [1, N, D] of text tokens [N]."""
        ...

    def rows(self, parents: tuple[int, ...], count: int) -> Rows:
        """Return what the last `count` rows of a tree see."""
        ...


class Session(ABC):
    """One request on one model: its KV cache, where its next token stands, and the tree behind the known rows."""

    def __init__(self, model: Served, prompt: Prompt, capacity: int) -> None:
        self.model = model
        self.workspace = model.workspaces.lease(capacity)
        weakref.finalize(self, model.workspaces.release, self.workspace)
        self.cache = KVCache(self.workspace.storage)
        self.length = 0  # rows of the prompt and of the text; rows of the cache behind them belong to the tree
        self.position = prompt.next_position
        self._prompt_len = len(prompt)
        self._is_3d = prompt.positions.dim() == 3
        self._behind = prompt.behind
        self._parents: tuple[int, ...] = ()  # of the tree rows

    @abstractmethod
    def _prefill(self, prompt: Prompt, scores: attention.Scores | None) -> Tensor:
        """Store the rows of a part of the prompt; return the hidden states [D] of the last one."""

    @abstractmethod
    def forward(self, tokens: Tensor, rows: Rows, scores: attention.Scores | None = None) -> Tensor:
        """Run tree rows [N] behind the tree rows stored before; return their logits [N, vocab].

        `scores` collects the attention of the first of them. Where the known text ends is read from
        `workspace.state`, or from the host, and neither is changed.
        """

    @abstractmethod
    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """Run a function that calls `forward`, reads memory of fixed place and waits for nothing, as fast as can be."""

    def prefill(self, prompt: Prompt, scores: attention.Scores | None) -> Tensor:
        """Store the rows of the prompt, in chunks of bounded size; return the logits [vocab] after the last one."""
        self.cache.reserve(len(prompt))
        with on(self.model.device):
            for part in prompt.chunks(PREFILL_ROWS):
                hidden = self._prefill(part, scores)
                self.cache.advance(len(part))
            self.length = self.cache.length
            return self._logits(hidden[None])[0].float()

    @abstractmethod
    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [T, vocab] of hidden states [T, D]."""

    def copy_rows(self, source: Session, rows: Tensor | slice) -> None:
        """Add rows [n] of another session's cache to the known text: one gather for all layers."""
        found = source.workspace.storage[:, :, :, rows]
        count, begin = found.shape[3], self.length
        self.cache.rollback(begin)
        self.cache.reserve(count)
        self.workspace.storage[:, :, :, begin : begin + count] = found
        self.cache.advance(count)
        self.length += count
        self.position += count

    def step(self, tokens: Tensor, parents: Sequence[int]) -> Tensor:
        """Run N tree rows in one pass; return their logits [N, vocab] float32.

        Args:
            tokens: [N] int64.
            parents: of each row: a tree row (of this or an earlier step since the last `keep`), -1 for the known text.
        """
        parents = self._parents + tuple(parents)
        logits = self.verify(tokens, self.model.rows(parents, tokens.shape[0]))
        self._parents = parents
        return logits

    @torch.inference_mode()
    def verify(self, tokens: Tensor, rows: Rows, scores: attention.Scores | None = None) -> Tensor:
        """Run N tree rows in one pass, as `step` does, of a tree that the host need not know.

        A GPU runs all trees of one size as one graph: what each row sees is its input. With `scores`, which collect the
        first row's attention, it runs without a graph.
        """
        count, of_tree = rows.sees.shape
        if count > MAX_NODES + 1:
            raise ConfigError(f"{count - 1} drafted nodes are too many: a pass verifies at most {MAX_NODES}")
        self.cache.reserve(count)
        if scores is not None or not self.is_captured:
            logits = self.run(None, lambda: self.forward(tokens, rows, scores)).float()
        else:
            place = ("rows", count, of_tree)
            mine = self.workspace.own(place, lambda: Rows(rows.sees.clone(), rows.depths.clone()))
            mine.sees.copy_(rows.sees, non_blocking=True)
            mine.depths.copy_(rows.depths, non_blocking=True)
            self.workspace.tokens[:count].copy_(tokens, non_blocking=True)
            key = self._key(count, of_tree)
            found = self.run(key, lambda: self.forward(self.workspace.tokens[:count], mine))
            logits = found.to(torch.float32, copy=True)  # the next replay overwrites a graph's output
        self.cache.advance(count)
        return logits

    def is_ready(self, count: int) -> bool:
        """Whether a pass of this many rows behind the known text is as fast as it will be."""
        return not self.is_captured or self.workspace.has(self._key(count, count))

    def capture(self, count: int) -> None:
        """Make ready for passes of this many rows behind the known text."""
        self.step(self.workspace.tokens[:count].clone(), range(-1, count - 1))
        self.keep(())

    @staticmethod
    def _key(count: int, of_tree: int) -> Hashable:
        return ("rows", count, of_tree)

    @property
    @abstractmethod
    def is_captured(self) -> bool:
        """Whether `run` replays CUDA graphs."""

    def positions(self, first: int | Tensor, rows: Rows) -> Tensor:
        """Return the positions of tree rows, [3, 1, N] for M-RoPE, else [1, N]; `first` is that of the root's."""
        shape = (3, 1, -1) if self._is_3d else (1, -1)
        positions = (first - 1 + rows.depths).expand(shape)
        return positions if self._behind is None else positions - self._behind

    @property
    def is_at_prompt(self) -> bool:
        """Whether the known text is the prompt alone."""
        return self.length == self._prompt_len

    def rollback(self, length: int | None = None) -> None:
        """Go back to a number of rows, by default to the end of the prompt."""
        length = self._prompt_len if length is None else length
        self.cache.rollback(length)
        self.position -= self.length - length
        self.length = length
        self._parents = ()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Make the tree rows `rows` (one path, from the root down) part of the text; forget the other tree rows."""
        self.cache.keep(self.length, rows)
        self.length += len(rows)
        self.position += len(rows)
        self._parents = ()


class HFSession(Session):
    """A session on the Hugging Face modules as they are: the reference (`eager`)."""

    is_captured = False

    def __init__(self, model: Served, prompt: Prompt, capacity: int) -> None:
        super().__init__(model, prompt, capacity)
        takes = inspect.signature(model.hf.model.language_model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24

    def _prefill(self, prompt: Prompt, scores: attention.Scores | None) -> Tensor:
        extras: dict[str, Any] = {}
        if prompt.deepstack:
            is_visual = torch.zeros(1, len(prompt), dtype=torch.bool, device=prompt.visual_index.device)
            is_visual[0, prompt.visual_index] = True
            extras = {"visual_pos_masks": is_visual, "deepstack_visual_embeds": list(prompt.deepstack)}
        return self._language_model(prompt.embeds, prompt.positions, attention.Plan(scores=scores), **extras)[-1]

    def forward(self, tokens: Tensor, rows: Rows, scores: attention.Scores | None = None) -> Tensor:
        """Run tree rows [N] behind the tree rows stored before; return their logits [N, vocab]."""
        count, of_tree = rows.sees.shape
        self.cache.length = self.length + of_tree - count
        positions = self.positions(self.position, rows)
        plan = attention.Plan(rows, scores)
        return self._logits(self._language_model(self.model.embed(tokens), positions, plan))

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.hf.lm_head(hidden)
        return logits

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """Run the function."""
        with on(self.model.device):
            return function()

    def _language_model(self, embeds: Tensor, positions: Tensor, plan: attention.Plan, **extras: Any) -> Tensor:
        """Run new rows [1, T, D]; return their hidden states [T, D]."""
        kwargs = {self._cache_name: self.cache, "use_cache": True, "plan": plan, **extras}
        out = self.model.hf.model.language_model(inputs_embeds=embeds, position_ids=positions, **kwargs)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


class FusedSession(Session):
    """A session on the fused decoder, whose steps are CUDA graphs on a GPU."""

    def _prefill(self, prompt: Prompt, scores: attention.Scores | None) -> Tensor:
        decoder, end = self._decoder, self.cache.length + len(prompt)

        def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            rows, keys, values = query.transpose(0, 1)[None], keys[None, :, :end], values[None, :, :end]
            if scores is not None:
                scores.add(layer, rows, keys, decoder.scaling)
            return attention.causal(rows, keys, values, decoder.scaling)[0].transpose(0, 1)

        hidden = decoder(
            prompt.embeds[0].clone(),
            decoder.rotary(prompt.embeds, prompt.positions),
            self.workspace.storage,
            upload([self.cache.length], self.model.device, torch.int32),
            0,
            attend,
            prompt.deepstack,
            prompt.visual_index,
        )
        return hidden[-1]

    def forward(self, tokens: Tensor, rows: Rows, scores: attention.Scores | None = None) -> Tensor:
        """Run tree rows [N] behind the tree rows stored before; return their logits [N, vocab]."""
        decoder, start, position = self._decoder, self.workspace.state[:1], self.workspace.state[1:]
        count, of_tree = rows.sees.shape
        embeds = self.model.embed(tokens)

        first, end = self.length + of_tree - count + 1, self.length + of_tree
        mask = None if tokens.is_cuda else attention.Plan(rows).mask(end)

        def attend(layer: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if scores is not None:
                scores.add(layer, query[:1].transpose(0, 1)[None], keys[None, :, :first], decoder.scaling)
            if query.is_cuda:
                out = tree_attention(query[None], keys[None], values[None], start, rows.sees, scaling=decoder.scaling)
                return out[0]
            batch = (query.transpose(0, 1)[None], keys[None, :, :end], values[None, :, :end])
            return attention.masked(*batch, mask, decoder.scaling)[0].transpose(0, 1)

        rotary = decoder.rotary(embeds, self.positions(position, rows))
        hidden = decoder(embeds[0], rotary, self.workspace.storage, start, of_tree - count, attend)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.model.head)

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """Run the function, on a GPU as a CUDA graph that is captured the first time, unless its key is None."""
        self.workspace.set_state(self.length, self.position)
        with on(self.model.device):
            return function() if key is None or not self.is_captured else self.workspace.run(key, function)

    @property
    def is_captured(self) -> bool:
        """Whether `run` replays CUDA graphs."""
        return self.model.device.type == "cuda" and self._behind is None  # a graph serves other prompts, too

    @property
    def _decoder(self) -> Decoder:
        assert self.model.decoder is not None
        return self.model.decoder
