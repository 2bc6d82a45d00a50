"""Peak memory of a training step on one rank: the largest of the moments at which most is alive."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mirai_ds.config import RunConfig, build
from mirai_ds.config.deepspeed_file import NEEDS_STAGE, read, resolve
from mirai_ds.config.sizes import block_parameters
from mirai_ds.planning.activations import FP32, ActivationMemory
from mirai_ds.planning.costs import encoder_shape
from mirai_ds.planning.flops import ViT
from mirai_ds.planning.states import StateMemory

Parts = dict[str, float]


@dataclass(frozen=True)
class PeakCandidate:
    """The bytes in use at one moment of a step, by what they hold."""

    name: str
    parts: Parts

    @property
    def total(self) -> float:
        """The sum of all parts in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """The memory of one rank between steps and at each moment of a step."""

    resting: Parts
    moments: list[PeakCandidate]

    @property
    def peak(self) -> PeakCandidate:
        """The moment at which most memory is in use."""
        return max(self.moments, key=lambda moment: moment.total)


def predict(config: RunConfig, world: int, compiled_loss: bool = True, device: str = "cuda") -> Memory:
    """The memory of `config` on each of `world` ranks; device: `cuda` or `cpu`.  Raises UserError where `resolve`
    does.  With recompute policy `budget` it is an upper bound: the compiler chooses what it keeps."""
    ds_config = resolve(config, world)
    vit = encoder_shape(config.foresight, config.model)
    work = ActivationMemory(
        config.model, config.foresight, vit.width if vit else config.model.width, config.train.precision,
        ds_config["train_micro_batch_size_per_gpu"], config.train.recompute, compiled_loss,
        config.train.cross_entropy == "chunked", device, config.train.compiles_on(device),
    )  # fmt: skip
    states = StateMemory.of(work, ds_config, world)
    resting: Parts = {**states.resting(), "teacher": teacher_bytes(config, vit)}
    return Memory(resting, list(_moments(config, work, states, resting, vit)))


def variant(config: RunConfig, stage: int, recompute: dict[str, Any], micro: int) -> RunConfig:
    """The run on another stage, with another recompute policy and micro batch."""
    data = config.model_dump(mode="json")
    file = copy.deepcopy(read(config.deepspeed))
    zero = file.setdefault("zero_optimization", {})
    zero["stage"] = stage
    for key, lowest in NEEDS_STAGE.items():
        if stage < lowest:
            zero.pop(key, None)
    data["deepspeed"] = file
    data["train"] |= {"micro_batch_size": micro, "grad_accum_steps": None, "recompute": recompute}
    return build(data)


def teacher_bytes(config: RunConfig, vit: ViT | None) -> float:
    """Mirai-E: embeddings and the first blocks, in fp32 unless the model is bf16; Mirai-I: the encoder."""
    f = config.foresight
    if vit is not None:
        kept = f.encoder is not None and f.encoder.dtype == "bf16"
        return float((2 if kept else FP32) * vit.parameters)
    if f.teacher != "gpt":
        return 0.0
    m = config.model
    tables = (m.vocab_size + m.num_classes + 1 + m.learnable_tokens) * m.width
    return float(_teacher_number(config) * (tables + (f.teacher_layer or 0) * block_parameters(m)))


def refreshed_bytes(config: RunConfig) -> float:
    """What of the teacher comes anew from the average before each step: nothing of a frozen one, or of an encoder."""
    f = config.foresight
    return teacher_bytes(config, None) if f.follows_average else 0.0


def _teacher_number(config: RunConfig) -> int:
    f = config.foresight
    low = f.teacher_dtype == "bf16" or (f.teacher_dtype == "auto" and config.train.precision == "bf16")
    return 2 if low else FP32


def _target(config: RunConfig, work: ActivationMemory, vit: ViT | None) -> float:
    """The teacher's features, alive for the whole step; mtp's are the tokens."""
    f, m = config.foresight, config.model
    if vit is not None:
        number = 2 if f.encoder is not None and f.encoder.dtype == "bf16" else FP32
        return float(work.micro * m.block_size * work.feature_dim * number)
    if f.teacher != "gpt":
        return 0.0
    slots = m.slots + (1 if f.teacher_sees_last_token else 0)
    return float(work.micro * slots * work.feature_dim * _teacher_number(config))


def _moments(
    config: RunConfig, work: ActivationMemory, states: StateMemory, resting: Parts, vit: ViT | None
) -> Iterator[PeakCandidate]:
    base = {**resting, "target": _target(config, work, vit), "carried gradients": states.carried()}
    kept: Parts = {"blocks": work.blocks(), "ends": work.ends(), "gathered parameters": states.gathered()}
    forgotten = work.feed_forward_weights() if work.recompute.policy == "mlp" else work.block_weights()
    cached = forgotten * sum(work.recomputed(i) for i in range(work.model.depth))
    heads = {"heads": work.heads(), "heads' outputs": work.projected()} if config.foresight.active else {}
    kept |= {"next-token loss": work.chunked_gradients()} if work.chunked else {}
    logits = 0 if work.chunked else work.logits
    yield PeakCandidate("teacher", {**base, "teacher's pass": _teacher_pass(config, work, states, vit)})
    fetched = {"fetched parameters": states.fetched()}  # the output layer is the last to be used, or the last head
    before: Parts = {**base, **kept, "weights cast for blocks": cached}
    yield PeakCandidate("output layer", {**before, **fetched, "logits": work.chunk_at_work() if work.chunked else 0.0})
    own = work.head_logits * (1 + work.heads_again) if work.mtp else 0  # the last head's, beside what it keeps
    yield PeakCandidate("loss", {**before, **heads, **(fetched if heads else {}), "logits": 2 * logits + own})
    if heads:
        parts = {**base, **kept, "logits": logits}
        yield from _mtp_backward(work, states, parts) if work.mtp else [_heads_backward(work, states, parts)]
    done = float(work.head_parameters)
    state = work.rows * work.model.width * work.residual
    aligned = {"hidden state's gradient": float(state)} if heads else {}
    if work.mtp:
        aligned["unembedding's gradient"] = unembedding_gradient(work)
    gradients = {"gradients": base["gradients"] + states.gradients(done)}
    scaled = work.chunked_gradients() if work.chunked else 0.0  # times what the loss receives
    yield PeakCandidate("loss backward", {**base, **kept, **aligned, **gradients, "logits": 3 * logits + scaled})
    yield from _backward(work, states, base, aligned, done)
    ended = {**base, "carried gradients": 0.0}
    yield PeakCandidate("last reduction", {**ended, "gradients": base["gradients"] + states.at_the_end()})
    yield PeakCandidate("update", {**ended, "gradients": base["gradients"] + states.update()})


def _heads_backward(work: ActivationMemory, states: StateMemory, parts: Parts) -> PeakCandidate:
    """In the last head: two hidden gradients, one head's weight gradient; the others' are done."""
    each = work.head_parameters / max(1, work.foresight.heads)
    wide = work.rows * work.widest_in_head * work.compute
    at_work = {"at work": 2.0 * wide + _weight_gradient(work, each), "new gradients": states.gradients(each)}
    return PeakCandidate("heads backward", {**parts, "heads": work.heads(), **at_work})


def unembedding_gradient(work: ActivationMemory) -> float:
    """mtp: the shared matrix's gradient is added up from the first head on to the next token's logits: in autocast of
    the one bf16 copy, but where heads are run again each has its own."""
    return work.output_parameters * (2.0 if work.autocast and not work.heads_again else work.parameter)


def _mtp_backward(work: ActivationMemory, states: StateMemory, parts: Parts) -> Iterator[PeakCandidate]:
    """Head by head from the last: its cross-entropy, its part of the shared matrix's gradient, its own layers."""
    f, each = work.foresight, work.head_parameters / work.foresight.heads
    again = work.head() + (2 * (each + work.output_parameters) if work.autocast else 0) if work.heads_again else 0
    wide = 2.0 * work.rows * work.widest_in_head * work.compute
    for gone in range(f.heads):
        held = {
            **parts, "heads": work.heads() + again - (0 if work.heads_again else gone * work.head()),
            "gradients": parts["gradients"] + states.gradients(gone * each),
        }  # fmt: skip
        shared, name = (unembedding_gradient(work) if gone else 0.0), f"head {f.heads - gone} backward"
        if gone:
            held["hidden state's gradient"] = float(work.rows * work.model.width * work.residual)
        yield PeakCandidate(f"{name}, entropy", {**held, "at work": 2.0 * work.head_logits + shared})
        held["heads"] -= work.head_logits
        logits = work.head_logits * (1.5 if work.low else 1.0)  # the fp32 gradient and its bf16 copy
        new = _weight_gradient(work, work.output_parameters) if work.heads_again else unembedding_gradient(work)
        yield PeakCandidate(f"{name}, logits", {**held, "at work": logits + new + shared})
        own = wide + _weight_gradient(work, each) + unembedding_gradient(work)
        yield PeakCandidate(f"{name}, layers", {**held, "at work": own})


def _weight_gradient(work: ActivationMemory, parameters: float) -> float:
    """A weight's gradient before it is where it belongs; in autocast it is first bf16, then fp32."""
    return parameters * (work.parameter + (2 if work.autocast else 0))


def _backward(
    work: ActivationMemory, states: StateMemory, base: Parts, aligned: Parts, done: float
) -> Iterator[PeakCandidate]:
    """The output layer, then the blocks from the last to the first, then the embeddings."""
    m, c = work.model, work.compute
    state = float(work.rows * m.width * work.residual)
    output = 0.0 if work.chunked else work.logits * (1.0 if not work.low else 1.5)  # fp32 gradient and bf16 copy
    yield PeakCandidate("output layer backward", {
        **base, "blocks": work.blocks(), "ends": work.ends(), "gathered parameters": states.gathered(), **aligned,
        "logits": output, "at work": _weight_gradient(work, work.output_parameters) + state,
        "gradients": base["gradients"] + states.gradients(done),
    })  # fmt: skip
    done += work.output_parameters
    for index in reversed(range(m.depth)):
        again = work.recomputed(index)
        held = work.blocks(index + 1) + work.again(index)
        if again and not states.bf16:
            held -= work.rows * m.width * work.residual  # its input is in both, and there once
        hidden = work.rows * m.ffn_hidden * c
        # In the gate's backward: three gradients of the hidden width, of which one replaces the product.
        at_work = 2.0 * hidden + 2 * state
        yield PeakCandidate(f"block {index + 1} backward", {
            **base, "blocks": float(held), "gathered parameters": states.gathered(),
            "ends": float(work.mask(m.token_dropout)), **(aligned if index >= (work.foresight.layer or 0) else {}),
            "at work": at_work + states.reduction(done), "gradients": base["gradients"] + states.gradients(done),
        })  # fmt: skip
        done += block_parameters(m)
    yield PeakCandidate("embeddings backward", {
        **base, "gathered parameters": states.gathered(),
        "at work": state + _weight_gradient(work, work.embedding_parameters) / (1.5 if work.autocast else 1),
        "gradients": base["gradients"] + states.gradients(done),
    })  # fmt: skip


def _teacher_pass(config: RunConfig, work: ActivationMemory, states: StateMemory, vit: ViT | None) -> float:
    """Without gradients nothing is kept: the weights on their way in, and one block's widest tensors."""
    m, f = config.model, config.foresight
    if vit is not None:
        number = 2 if f.encoder is not None and f.encoder.dtype == "bf16" else FP32
        pixels = work.micro * 3 * vit.image**2 * (2 * FP32)
        return float(pixels + work.micro * vit.tokens * vit.width * number * 11)
    if f.teacher != "gpt":
        return 0.0
    incoming = refreshed_bytes(config) if states.stage else 0.0
    wide = work.rows * (2 * m.width * FP32 + 3 * m.ffn_hidden * work.compute)
    return float(max(incoming * (1 if states.world > 1 else 0), wide))


def as_dict(memory: Memory) -> dict[str, Any]:
    """JSON-ready: bytes between steps and at every moment."""
    return {
        "resting_bytes": round(sum(memory.resting.values())),
        "peak_bytes": round(memory.peak.total),
        "peak_moment": memory.peak.name,
        "peak_parts": {name: round(size) for name, size in memory.peak.parts.items() if size},
        "moments": {moment.name: round(moment.total) for moment in memory.moments},
    }
