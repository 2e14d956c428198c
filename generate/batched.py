"""Many prompts at once: token for token what the official `generate()` gives for each alone.

One forward pass per step for all rows. Each row has its own mode (its next input is a text token or
a column of codes), delay state, position, length and random generator, so an answer does not depend
on its neighbours. A row that ends makes room for the next request (continuous batching).

    generate_many   requests -> answers, in the order in which they end
    Row             the state of one request: what the official loop keeps in local variables
    Decoder         the forward pass over new positions of several rows, with a key/value cache
    CompiledStep    the same for one new position of every row, as one graph of fixed shapes

Upstream's modules do the work and only their `forward` methods are replaced while a pass runs, from
outside. So PEFT's adapter layers, quantised layers and FSDP's hooks take part as they are.

Legend: R rows, P new positions of all rows, K codebooks, C audio vocabulary, D width, H key heads.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel
from boson_multimodal.model.higgs_audio.modeling_higgs_audio import HiggsAudioDualFFNDecoderLayer
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn import functional
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MaxLengthCriteria
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from common import CheckpointError, ConfigError, reason
from generate.official import STOP_STRINGS, Answer, Request, Sampling, make_answer, official_collator
from layers.nf4 import is_quantized

CACHE_STEP = 256  # positions by which the cache grows
MOST_ROWS = {"cpu": 16, "cuda": 128}  # more are hardly faster
USUAL_PROMPT = 1024  # positions
COMPILE = {"mode": "reduce-overhead"}  # CUDA graphs where there is a GPU; on a CPU as any other mode


def check(config: HiggsAudioConfig) -> None:
    """raises: CheckpointError if `generate_many` cannot run a model of this configuration"""
    plain = config.audio_adapter_type.startswith("dual_ffn") and not config.use_audio_out_self_attention
    plain = plain and len(set(config.audio_dual_ffn_layers)) == config.text_config.num_hidden_layers
    if not plain or config.audio_decoder_proj_num_layers or config.encode_whisper_embed or not config.encode_audio_in_tokens:
        raise CheckpointError(
            "this checkpoint cannot generate many prompts together: that needs dual-FFN layers throughout, and reference "
            "audio as codes, not through Whisper; use generate --official, or train without --sample_steps"
        )


def generate_many(
    model: HiggsAudioModel,
    tokenizer,
    requests: deque[Request],
    sampling: Sampling,
    batch_size: int,
    any_rank: Callable[[bool], bool] = bool,
    on_step: Callable[[int], object] = bool,
    compiled: bool = False,
) -> Iterator[tuple[Request, Answer]]:
    """Answer the requests, at most `batch_size` at a time; each is yielded as it ends.

    requests: is emptied; may be added to between answers. Seeds and lengths are the requests' own.
    any_rank: for a model under FSDP `Dist.any`. Then it is collective: every forward pass gathers
              weights, so ranks that have nothing to do take part until all have finished.
    on_step:  is told after each step how many tokens or columns it gave
    compiled: steps by `CompiledStep`; not for a model under FSDP
    """
    batch = Batch(model, tokenizer, sampling, batch_size, compiled)
    while any_rank(bool(requests or batch.rows)):
        if requests and len(batch.rows) < batch_size:
            batch.admit([requests.popleft() for _ in range(min(len(requests), batch_size - len(batch.rows)))])
        else:
            batch.step()
            on_step(len(batch.rows))
        yield from batch.pop_finished()


def rows_that_fit(model: HiggsAudioModel, max_new_tokens: int, compiled: bool = False) -> int:
    """How many usual prompts can be generated together in the memory that is free now, each up to its longest answer."""
    attention, device = model.layers[0].self_attn, next(model.parameters()).device
    size = 2 * len(model.layers) * attention.num_key_value_heads * attention.head_dim * model.norm.weight.element_size()
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] * 0.8 if on_gpu else psutil.virtual_memory().available * 0.5
    capacity = capacity_for(USUAL_PROMPT + max_new_tokens, compiled)
    return max(1, min(MOST_ROWS["cuda" if on_gpu else "cpu"], int(free // (size * capacity))))


def capacity_for(length: int, compiled: bool) -> int:
    """Positions that a cache has for so many; a graph is made for each capacity, so there are few: it doubles."""
    steps = -(-length // CACHE_STEP)
    return CACHE_STEP * (1 << (steps - 1).bit_length() if compiled else steps)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(eq=False)
class Row:
    """One request on its way."""

    request: Request
    config: HiggsAudioConfig
    generator: torch.Generator
    token_ids: list[int]  # of the prompt, then the answer's; a clip is one <|AUDIO_OUT|>
    window: np.ndarray  # [frames, K]: the last columns, of the prompt's <|AUDIO_OUT|> clips too; -1 where there are none
    position: int  # of the next input
    started: float  # time.perf_counter()
    num_steps: int = 0
    num_delay: int = 0  # codebooks that have begun, less one
    num_ending: int | None = None  # codebooks that have yet to end, once one has
    clips: list[list[np.ndarray]] = field(default_factory=list)  # the answer's, as delayed columns [K]
    finished: bool = False

    @property
    def is_audio(self) -> bool:
        """Whether the next input is a column of codes."""
        return self.token_ids[-1] == self.config.audio_out_token_idx

    def begin_clip(self) -> None:
        """A clip begins with a column of <|audio_stream_bos|>."""
        self.token_ids.append(self.config.audio_out_token_idx)
        self.clips.append([])
        self._append(np.full(self.config.audio_num_codebooks, self.config.audio_stream_bos_id))

    def _append(self, column: np.ndarray) -> None:
        self.clips[-1].append(column)
        if len(self.window):
            self.window[:-1] = self.window[1:]
            self.window[-1] = column

    def add_codes(self, codes: np.ndarray) -> bool:
        """Add the column that was drawn [K], with what the delay pattern prescribes; returns whether it is the clip's last."""
        K = len(codes)
        if self.config.use_delay_pattern:
            if self.num_delay + 1 < K:
                codes[self.num_delay + 1 :] = self.config.audio_stream_bos_id
                self.num_delay += 1
            ended = np.flatnonzero(codes == self.config.audio_stream_eos_id)
            if self.num_ending is not None:
                codes[: K - self.num_ending] = self.config.audio_stream_eos_id
                self.num_ending -= 1
            elif len(ended):
                codes[: ended[0]] = self.config.audio_stream_eos_id
                self.num_ending = K - int(ended[0]) - 1
        self._append(codes)
        if self.num_ending is None or self.num_ending > 0:
            return False
        self.num_delay, self.num_ending = 0, None
        return True

    def answer(self, tokenizer) -> Answer:
        delayed = [torch.from_numpy(np.stack(columns, axis=1)) for columns in self.clips]
        new_ids = self.token_ids[len(self.request.prompt.input_ids) :]
        return make_answer(delayed, new_ids, tokenizer, self.config, self.started)


class Batch:
    """Rows that are generated together, one token or column each per step."""

    def __init__(self, model: HiggsAudioModel, tokenizer, sampling: Sampling, size: int, compiled: bool = False):
        check(model.config)
        model.set_audio_special_tokens(tokenizer)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.device = next(model.parameters()).device
        self.collator = official_collator(model.config)
        self.decoder, self.cache = Decoder(model), Cache(size, compiled)
        self.compiled = CompiledStep(model, self.cache) if compiled else None
        self.rows: list[Row] = []
        self.processors, self.criteria = _official_rules(model, tokenizer, sampling, self.device)

    def admit(self, requests: Sequence[Request]) -> None:
        """Begin new rows: one pass over their whole prompts."""
        first, inputs, started = len(self.rows), [], time.perf_counter()
        for request in requests:
            prompt = self.collator([request.prompt])
            inputs.append(Inputs.of(prompt, self.model.config))
            generator = torch.Generator(self.device).manual_seed(request.seed)
            ids = request.prompt.input_ids.tolist()
            window = self._window(prompt.audio_out_ids)
            self.rows.append(Row(request, self.model.config, generator, ids, window, inputs[-1].num_positions, started))
        lengths = [each.num_positions for each in inputs]
        asked = [i for i, row in enumerate(self.rows[first:]) if not self._begins_clip(row)]
        last = np.cumsum(lengths)[asked] - 1
        logits, _ = self.decoder.run(Inputs.join(inputs), Prompts(self.cache, lengths, first), last, [])
        self._add_text(self.rows[first:], asked, logits)

    def _window(self, columns: Tensor | None) -> np.ndarray:
        """The last columns [frames, K] of [K, n], for repetition-aware sampling."""
        frames = self.sampling.ras_win_len
        window = np.full((frames, self.model.config.audio_num_codebooks), -1)
        if columns is not None and frames and columns.shape[-1]:
            last = columns.T.numpy()[-frames:]
            window[-len(last) :] = last
        return window

    def step(self) -> None:
        """One pass: the newest token or column of every row."""
        rows = self.rows
        audio = [i for i, row in enumerate(rows) if row.is_audio]
        text = [i for i, row in enumerate(rows) if not row.is_audio]
        asked = [i for i in text if not self._begins_clip(rows[i])]
        is_audio = np.array([row.is_audio for row in rows], bool)
        columns = np.array([rows[i].clips[-1][-1] for i in audio], np.int64).reshape(-1, self.model.config.audio_num_codebooks)
        inputs = Inputs(np.array([rows[i].token_ids[-1] for i in text], np.int64), columns.T, is_audio)
        positions = [row.position for row in rows]
        self.cache.grow(longest := max(positions, default=0) + 1)
        if self.compiled:
            text_logits, audio_logits = self.compiled.run(inputs, positions, asked, audio)
        else:
            attention = NewPositions(self.cache, torch.tensor(positions, dtype=torch.long, device=self.device), longest)
            text_logits, audio_logits = self.decoder.run(inputs, attention, asked, audio)
        for row in rows:
            row.position += 1
        if text:
            self._add_text([rows[i] for i in text], [text.index(i) for i in asked], text_logits)
        if audio:
            self._add_columns([rows[i] for i in audio], audio_logits)

    def pop_finished(self) -> list[tuple[Request, Answer]]:
        """Take out the rows that have ended; the last row moves into the gap."""
        finished = [row for row in self.rows if row.finished]
        for row in finished:
            slot, last = self.rows.index(row), len(self.rows) - 1
            self.cache.move(last, slot)
            self.rows[slot] = self.rows[last]
            self.rows.pop()
        return [(row.request, row.answer(self.tokenizer)) for row in finished]

    def _begins_clip(self, row: Row) -> bool:
        return row.token_ids[-1] == self.model.audio_out_bos_token_id

    def _add_text(self, rows: Sequence[Row], asked: Sequence[int], logits: Tensor) -> None:
        """rows: whose input was text; asked: those among them whose next token is drawn, from logits [asked, V]."""
        tokens: list[int] = []
        if asked:
            tokens = self._draw(logits[:, None], [rows[i] for i in asked])[:, 0].tolist()
        drawn = dict(zip(asked, tokens))
        for i, row in enumerate(rows):
            if i in drawn:
                self._add_token(row, drawn[i])
            else:
                row.begin_clip()
            self._count(row)

    def _add_token(self, row: Row, token: int) -> None:
        if token >= len(self.tokenizer):
            raise CheckpointError(f"the model generated token {token}, which its tokenizer of {len(self.tokenizer)} lacks")
        row.token_ids.append(token)
        row.finished = bool(self.criteria(torch.tensor([row.token_ids]), None))

    def _add_columns(self, rows: Sequence[Row], logits: Tensor) -> None:
        """logits: [R, K, C] float32"""
        columns = self._redraw_repeated(self._draw(logits, rows).numpy(), rows, logits)
        for codes, row in zip(columns, rows):
            if row.add_codes(codes):
                self._add_token(row, self.model.audio_eos_token_id)
            self._count(row)

    def _count(self, row: Row) -> None:
        row.num_steps += 1
        row.finished = row.finished or row.num_steps == row.request.max_new_tokens

    def _draw(self, logits: Tensor, rows: Sequence[Row]) -> Tensor:
        """Tokens [R, n] int64 on the host, from logits [R, n, V]; each row draws from its own generator."""
        scores = self.processors(None, logits.flatten(0, 1)).view_as(logits)
        if not self.sampling.temperature:
            return scores.argmax(-1).cpu()
        probs = scores.softmax(-1)
        noise = torch.empty_like(probs)
        for own, row in zip(noise, rows):
            own.exponential_(generator=row.generator)
        return (probs / noise).argmax(-1).cpu()  # how torch.multinomial draws once, for all rows together

    def _redraw_repeated(self, columns: np.ndarray, rows: Sequence[Row], logits: Tensor) -> np.ndarray:
        """Repetition-aware sampling: a code that is frequent in its row's window is drawn again, at temperature 1.

        columns: [R, K] as drawn first; logits: [R, K, C]
        """
        if self.sampling.ras_win_len == 0:
            return columns
        windows = np.stack([row.window for row in rows])  # [R, frames, K]
        repeated = (windows == columns[:, None]).sum(1) >= self.sampling.ras_win_max_num_repeat
        for i in np.flatnonzero(repeated.any(1)):
            probs = logits[i, torch.from_numpy(repeated[i])].softmax(-1)
            drawn = probs.multinomial(1, replacement=True, generator=rows[i].generator)
            columns[i, repeated[i]] = drawn.squeeze(1).cpu().numpy()
        return columns


def _official_rules(
    model: HiggsAudioModel, tokenizer, sampling: Sampling, device: torch.device
) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
    """What the official call does to scores before it draws, and when it ends apart from its longest length."""
    known = ("do_sample", "temperature", "top_k", "top_p")
    arguments = {"do_sample": False} | {name: value for name, value in sampling.arguments().items() if name in known}
    # Upstream fails on an audio placeholder that the model generates, as an untrained one may.
    suppressed = [model.config.audio_in_token_idx, model.config.audio_out_token_idx]
    config, _ = model._prepare_generation_config(None, stop_strings=list(STOP_STRINGS), suppress_tokens=suppressed, **arguments)
    model._prepare_special_tokens(config, True, device=device)
    processors = model._get_logits_processor(config, 0, None, None, LogitsProcessorList(), device=str(device))
    model._prepare_special_tokens(config, True, device="cpu")
    criteria = model._get_stopping_criteria(config, StoppingCriteriaList(), tokenizer=tokenizer)
    return processors, StoppingCriteriaList(c for c in criteria if not isinstance(c, MaxLengthCriteria))


# ---------------------------------------------------------------------------------------------------------------------
# Forward pass


@dataclass
class Inputs:
    """New positions, on the host."""

    text_ids: np.ndarray  # [text positions] int64
    codes: np.ndarray  # [K, audio positions] int64, delayed, with stream ids
    is_audio: np.ndarray  # [P] bool

    @property
    def num_positions(self) -> int:
        return len(self.is_audio)

    @classmethod
    def of(cls, batch, config: HiggsAudioConfig) -> Inputs:
        """All positions of the single sample in an official batch: placeholders become their clips' columns."""
        ids = batch.input_ids[0].numpy()
        clips = {
            config.audio_in_token_idx: iter(_clips(batch.audio_in_ids, batch.audio_in_ids_start)),
            config.audio_out_token_idx: iter(_clips(batch.audio_out_ids, batch.audio_out_ids_start)),
        }
        codes = [np.zeros((config.audio_num_codebooks, 0), np.int64)]
        is_audio: list[bool] = []
        for token in ids.tolist():
            if token in clips:
                codes.append(next(clips[token]))
            is_audio += [True] * codes[-1].shape[1] if token in clips else [False]
        return cls(ids[~np.isin(ids, list(clips))], np.concatenate(codes, axis=1), np.array(is_audio, bool))

    @classmethod
    def join(cls, parts: Sequence[Inputs]) -> Inputs:
        return cls(
            np.concatenate([part.text_ids for part in parts]),
            np.concatenate([part.codes for part in parts], axis=1),
            np.concatenate([part.is_audio for part in parts]),
        )


def _clips(ids: Tensor | None, starts: Tensor | None) -> list[np.ndarray]:
    """Clips one after the other [K, sum of columns] -> [K, columns] each."""
    if ids is None or not ids.shape[-1]:
        return []
    return np.split(ids.numpy(), starts[1:].numpy(), axis=1)


class Mixture:
    """Which of P positions are text and which are audio, on the device."""

    def __init__(self, is_audio: np.ndarray, device: torch.device):
        text, audio = np.flatnonzero(~is_audio), np.flatnonzero(is_audio)
        self.num_text, self.num_audio = len(text), len(audio)
        if self.num_text and self.num_audio:
            order = np.concatenate([text, audio])
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            self.order, self.inverse = torch.from_numpy(np.stack([order, inverse])).to(device)

    def apply(self, hidden: Tensor, on_text: Callable[[Tensor], Tensor], on_audio: Callable[[Tensor], Tensor]) -> Tensor:
        """[P, D] -> [P, D], text positions by one function and audio positions by the other."""
        if not self.num_audio:
            return on_text(hidden)
        if not self.num_text:
            return on_audio(hidden)
        text, audio = hidden.index_select(0, self.order).split([self.num_text, self.num_audio])
        return self.join(on_text(text), on_audio(audio))

    def join(self, text: Tensor, audio: Tensor) -> Tensor:
        if not self.num_audio or not self.num_text:
            return text if not self.num_audio else audio
        return torch.cat([text, audio]).index_select(0, self.inverse)


class Cache:
    """Keys and values of every layer, one tensor [2, R, H, capacity, head_dim] each, which grow; see `capacity_for`."""

    def __init__(self, num_rows: int, compiled: bool = False):
        self.num_rows, self.compiled, self.capacity = num_rows, compiled, 0
        self.layers: dict[int, Tensor] = {}

    def grow(self, length: int) -> None:
        """Make room for so many positions."""
        extra = capacity_for(length, self.compiled) - self.capacity
        if extra > 0:
            self.capacity += extra
            for layer, states in self.layers.items():  # one after the other: never two copies of all
                self.layers[layer] = functional.pad(states, (0, 0, 0, extra))

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        if source != target:
            for states in self.layers.values():
                states[:, target] = states[:, source]

    def of(self, layer: int, key: Tensor) -> Tensor:
        """The layer's tensor; key: [P, H, head_dim], which says what is to be stored."""
        if layer not in self.layers:
            shape = 2, self.num_rows, key.shape[1], self.capacity, key.shape[2]
            self.layers[layer] = torch.zeros(shape, dtype=key.dtype, device=key.device)
        return self.layers[layer]


class Prompts:
    """How new positions attend that are whole prompts, one after the other: causally, each prompt to itself."""

    def __init__(self, cache: Cache, lengths: Sequence[int], first: int):
        self.cache, self.lengths, self.first = cache, list(lengths), first
        self.positions = np.concatenate([np.arange(length) for length in lengths])
        cache.grow(max(lengths))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[P, heads, head_dim] -> [P, heads, head_dim]"""
        cached, attended = self.cache.of(layer, key), []
        parts = zip(*(states.split(self.lengths) for states in (query, key, value)))
        for row, part in enumerate(parts, start=self.first):
            q, k, v = (states.transpose(0, 1) for states in part)  # [length, heads, ...] -> [heads, length, ...]
            cached[0, row, :, : k.shape[1]] = k
            cached[1, row, :, : v.shape[1]] = v
            out = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
            attended.append(out[0].transpose(0, 1))
        return torch.cat(attended)


class NewPositions:
    """How one new position of each row attends: to all of the row."""

    def __init__(self, cache: Cache, positions: Tensor, longest: int):
        """positions: [R] int64; longest: more than any of them"""
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self.mask = torch.arange(longest, device=positions.device) <= positions[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[R, heads, head_dim] -> [R, heads, head_dim]"""
        R, H, head_dim = key.shape
        if not R:
            return query
        cached = self.cache.of(layer, key)
        cached[0, self.rows, :, self.positions] = key
        cached[1, self.rows, :, self.positions] = value
        keys, values = cached[:, :R, :, : self.mask.shape[1]]
        # Queries that share a key head take the place of queries at several positions.
        query = query.view(R, H, -1, head_dim)
        attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask[:, None, None])
        return attended.flatten(1, 2)


class Decoder:
    """The model's forward pass over new positions."""

    def __init__(self, model: HiggsAudioModel):
        self.model, self.device = model, next(model.parameters()).device
        on_cpu = self.device.type == "cpu" and mkldnn.is_available()
        linears = [module for module in model.layers.modules() if type(module) is nn.Linear and on_cpu]
        self.linears = [linear for linear in linears if not is_quantized(linear.weight)]

    def run(
        self, inputs: Inputs, attention: Prompts | NewPositions, text_rows: Sequence[int], audio_rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Logits in float32 of the positions asked for: text [text_rows, V] and audio [audio_rows, K, C]."""
        now = Pass(inputs, attention, text_rows, audio_rows, self.device)
        layers = {layer: functools.partial(_forward_layer, i, layer) for i, layer in enumerate(self.model.layers)}
        heads = self.model.audio_decoder_proj
        linears = {linear: functools.partial(_forward_linear, linear) for linear in self.linears}
        replaced = {self.model: functools.partial(_forward, self.model), heads: functools.partial(_forward_heads, heads)}
        replaced |= layers | linears
        for module, forward in replaced.items():
            module.forward = functools.partial(forward, now)
        try:
            with torch.no_grad():  # FSDP cannot gather weights in inference mode
                text, audio = self.model(now.text_ids)
        finally:
            for module in replaced:
                del module.forward
        return text, audio.unflatten(1, (self.model.config.audio_num_codebooks, -1))


class Pass:
    """What the replaced forward methods read during one pass."""

    def __init__(self, inputs: Inputs, attention: Prompts | NewPositions, text_rows, audio_rows, device: torch.device):
        values = inputs.text_ids, inputs.codes, attention.positions, text_rows, audio_rows
        values = [torch.as_tensor(value, dtype=torch.long).to(device) for value in values]
        self.text_ids, self.codes, self.positions, self.text_rows, self.audio_rows = values
        self.attend = attention.attend
        self.mixture = Mixture(inputs.is_audio, device)
        self.rotary: tuple[Tensor, Tensor] | None = None  # cosines and sines [P, head_dim]


def _forward(model: HiggsAudioModel, now: Pass, text_ids: Tensor) -> tuple[Tensor, Tensor]:
    hidden = model.embed_tokens(text_ids)
    if now.mixture.num_audio:
        hidden = now.mixture.join(hidden, model._embed_audio_ids(now.codes).to(hidden.dtype))
    now.rotary = tuple(table[0] for table in model.rotary_emb(hidden, now.positions[None]))
    for layer in model.layers:
        hidden = layer(hidden)
    return model.audio_decoder_proj(_normed(model.norm, hidden))


def _forward_layer(index: int, layer: HiggsAudioDualFFNDecoderLayer, now: Pass | CompiledPass, hidden: Tensor) -> Tensor:
    """[P, D] -> [P, D]"""
    attention, apply = layer.self_attn, now.mixture.apply
    text_norm, audio_norm = (functools.partial(_normed, norm) for norm in (layer.input_layernorm, layer.audio_input_layernorm))
    normed = apply(hidden, text_norm, audio_norm)
    query, key, value = (
        projection(normed).unflatten(1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *now.rotary)
    hidden = hidden + attention.o_proj(now.attend(index, query, key, value).flatten(1))
    return hidden + apply(
        hidden,
        lambda text: layer.mlp(_normed(layer.post_attention_layernorm, text)),
        lambda audio: layer.audio_mlp(_normed(layer.audio_post_attention_layernorm, audio)),
    )


def _forward_linear(linear: nn.Linear, now: Pass, hidden: Tensor) -> Tensor:
    """oneDNN's product in place of MKL's, for float32 too: measured for 16 rows on two cores, it takes 0.6 of the time."""
    if not len(hidden) or linear.weight.dtype != torch.float32:
        return functional.linear(hidden, linear.weight, linear.bias)
    return torch.ops.mkldnn._linear_pointwise(hidden, linear.weight, linear.bias, "none", [], "")


def _forward_heads(heads: nn.Module, now: Pass, hidden: Tensor) -> tuple[Tensor, Tensor]:
    text = heads.text_lm_head(hidden.index_select(0, now.text_rows))
    return text.float(), heads.audio_lm_head(hidden.index_select(0, now.audio_rows)).float()


def _normed(norm: LlamaRMSNorm, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, norm.weight.shape, norm.weight.to(hidden.dtype), norm.variance_epsilon)


# ---------------------------------------------------------------------------------------------------------------------
# The step as one graph


class CompiledPass:
    """What `_forward_layer` reads, at fixed shapes: both functions take all rows, and each row takes its own result.

    is_audio: [R] bool, None where no row is text: then the text's function does not run
    """

    def __init__(self, is_audio: Tensor | None, attention: NewPositions, rotary: tuple[Tensor, Tensor]):
        self.is_audio, self.attend, self.rotary, self.mixture = is_audio, attention.attend, rotary, self

    def apply(self, hidden: Tensor, on_text: Callable[[Tensor], Tensor], on_audio: Callable[[Tensor], Tensor]) -> Tensor:
        """[R, D] -> [R, D]"""
        audio = on_audio(hidden)
        return audio if self.is_audio is None else torch.where(self.is_audio[:, None], audio, on_text(hidden))


class CompiledStep:
    """`Decoder.run` for one new position of each row of the cache, in use or not, compiled: two graphs for each capacity."""

    def __init__(self, model: HiggsAudioModel, cache: Cache):
        self.model, self.cache = model, cache
        self.graph = torch.compile(self._step, fullgraph=True, dynamic=False, **COMPILE)

    def run(
        self, inputs: Inputs, positions: Sequence[int], text_rows: Sequence[int], audio_rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """See `Decoder.run`. Rows not in use write to position 0 of their own, which a prompt will overwrite."""
        R, used = self.cache.num_rows, len(positions)
        is_audio = np.pad(inputs.is_audio, (0, R - used), constant_values=True)
        text_ids, where = np.zeros(R, np.int64), np.pad(np.array(positions, np.int64), (0, R - used))
        codes = np.zeros((len(inputs.codes), R), np.int64)
        text_ids[~is_audio] = inputs.text_ids
        codes[:, :used][:, inputs.is_audio] = inputs.codes
        values = [
            torch.from_numpy(value).to(self.model.embed_tokens.weight.device) for value in (codes, where, text_ids, is_audio)
        ]
        for states in self.cache.layers.values():
            torch._dynamo.mark_static_address(states)  # CUDA graphs write to it where it is
        try:
            with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
                text, audio = self.graph(*values[:2], *(values[2:] if len(inputs.text_ids) else ()))
        except torch._dynamo.exc.TorchDynamoException as error:  # no compiler, no Triton
            raise ConfigError(f"--compile: {reason(error)}; leave it out") from None
        return text[text_rows], audio[audio_rows]

    def _step(
        self, codes: Tensor, positions: Tensor, text_ids: Tensor | None = None, is_audio: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """codes: [K, R]; others [R], None where no row is text -> logits [R, V], or [0] without text, and [R, K, C]"""
        model, heads = self.model, self.model.audio_decoder_proj
        hidden = model._embed_audio_ids(codes).to(heads.audio_lm_head.weight.dtype)
        if is_audio is not None:
            hidden = torch.where(is_audio[:, None], hidden, model.embed_tokens(text_ids))
        rotary = tuple(table[0] for table in model.rotary_emb(hidden, positions[None]))
        now = CompiledPass(is_audio, NewPositions(self.cache, positions, self.cache.capacity), rotary)
        for index, layer in enumerate(model.layers):
            hidden = _forward_layer(index, layer, now, hidden)
        hidden = _normed(model.norm, hidden)
        text = hidden.new_empty(0) if is_audio is None else heads.text_lm_head(hidden).float()
        return text, heads.audio_lm_head(hidden).float().unflatten(1, (len(codes), -1))
