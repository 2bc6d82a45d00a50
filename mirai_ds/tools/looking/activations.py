"""Bytes that a forward pass keeps for its backward pass, counted tensor by tensor from what the modules save.

The rules are autograd's: a product keeps its factors, a linear layer its input, SiLU its input, attention q, k, v, its
output and the logarithm of its sum; sums, views, casts and products with a number keep nothing.  A tensor that two
operations keep is counted once.  `tests/tools/looking` compares the sums with the allocator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mirai_ds.config import ForesightConfig, ModelConfig, RecomputeConfig
from mirai_ds.config.sizes import block_parameters, parameter_count, projector_parameters
from mirai_ds.observe.flops import student_slots

FP32 = 4


@dataclass(frozen=True)
class Pass:
    """One rank's forward pass: `micro` sequences, and who aligns them.  feature_dim: the teacher's width."""

    model: ModelConfig
    foresight: ForesightConfig
    feature_dim: int
    precision: str
    micro: int
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    compiled_loss: bool = True  # mirai::foresight_cosine's kernel, not its reference in plain PyTorch

    @property
    def rows(self) -> int:
        """Slots of all sequences."""
        return self.micro * student_slots(self.model)

    @property
    def low(self) -> bool:
        """Whether matrix products run in bf16."""
        return self.precision != "fp32"

    @property
    def compute(self) -> int:
        """Bytes of a number that a matrix product reads and writes."""
        return 2 if self.low else FP32

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream: autocast leaves it in fp32."""
        return 2 if self.precision == "bf16" else FP32

    @property
    def parameter(self) -> int:
        """Bytes of a parameter and of its gradient as autograd makes it."""
        return 2 if self.precision == "bf16" else FP32

    @property
    def autocast(self) -> bool:
        """Whether weights are cast to bf16 anew in each forward pass, and the copies kept for the backward pass."""
        return self.precision == "bf16-autocast"

    # --- sizes in parameters ----------------------------------------------------------------------------------------

    @property
    def head_parameters(self) -> int:
        """All alignment heads."""
        f = self.foresight
        return f.heads * projector_parameters(self.model.width, f.projector_dim, self.feature_dim)

    @property
    def parameters(self) -> int:
        """GPT and heads."""
        return parameter_count(self.model) + self.head_parameters

    @property
    def block_linear(self) -> int:
        """A block's matrices."""
        return block_parameters(self.model) - 2 * self.model.width

    @property
    def output_parameters(self) -> int:
        """The output matrix and the last norm."""
        return (self.model.vocab_size + 1) * self.model.width

    @property
    def embedding_parameters(self) -> int:
        """The token and class tables."""
        return (self.model.vocab_size + self.model.num_classes + 1) * self.model.width

    # --- kept for backward ------------------------------------------------------------------------------------------

    @property
    def logits(self) -> int:
        """(B, N, V) in fp32, once."""
        return self.rows * self.model.vocab_size * FP32

    def norm(self) -> int:
        """RMSNorm: the fp32 input (in bf16 a copy of its own), 1/rms, the normed value, and its output, which the next
        linear layer reads: in autocast as a bf16 copy."""
        width = self.rows * self.model.width
        return width * (FP32 + self.residual + self.compute) + self.rows * FP32

    def mask(self, rate: float) -> int:
        """A keyed dropout's mask, one byte an element."""
        return self.rows * self.model.width if rate > 0 else 0

    def block(self) -> int:
        """All that one block keeps, its fp32 input included (in bf16 nothing keeps the input, but the norm's copy)."""
        m, rows, c = self.model, self.rows, self.compute
        width, hidden = rows * m.width, rows * m.ffn_hidden
        attention = width * c * (3 + 2 + 1) + rows * m.heads * FP32  # qkv (v is a view of it); rotated q, k; output
        feed_forward = 4 * hidden * c  # w1 x, silu of it, w3 x, their product
        shared_input = width * c if self.autocast else 0  # w1 and w3 each cast the same fp32 input
        rates = (0.0, 0.0) if m.drop_path else (m.resid_dropout, m.ffn_dropout)
        masks = sum(self.mask(rate) for rate in rates)
        return 2 * self.norm() + attention + feed_forward + shared_input + masks

    def block_weights(self) -> int:
        """bf16 copies of one block's matrices, in autocast."""
        return 2 * self.block_linear if self.autocast else 0

    def recomputed(self, index: int) -> bool:
        """Whether block `index` (0-based) is run again in the backward pass."""
        policy, every = self.recompute.policy, self.recompute.every
        return policy == "full" or (policy == "every-n" and index % every == 0)

    def kept_by_block(self, index: int) -> int:
        """Bytes that stay from block `index`'s forward pass to its backward pass, weight copies included."""
        if not self.recomputed(index):
            return self.block() + self.block_weights()
        return self.rows * self.model.width * self.residual

    def ends(self) -> int:
        """Token dropout's mask, the last norm, and the output matrix's bf16 copy in autocast."""
        copies = 2 * self.model.vocab_size * self.model.width if self.autocast else 0
        return self.mask(self.model.token_dropout) + self.norm() + copies

    def heads(self, aligned: bool = True) -> int:
        """What the alignment heads keep: inputs, four hidden tensors each, and the loss's ready gradient."""
        f, rows, c = self.foresight, self.rows, self.compute
        if not f.heads or not aligned:
            return 0
        # In autocast each head casts the hidden state; in bf16 nobody else keeps it, but a recomputed block above.
        own = 1 - self.recomputed(f.layer or 0) if (f.layer or 0) < self.model.depth else 1
        inputs = {"bf16-autocast": f.heads, "bf16": own, "fp32": 0}[self.precision] * rows * self.model.width * 2
        kept = f.heads * rows * (4 * f.projector_dim * c + self.loss_of_a_head())
        return inputs + kept + (2 * self.head_parameters if self.autocast else 0)

    def loss_of_a_head(self) -> int:
        """Bytes a slot that the cosine keeps: the kernel the gradient; the reference (in fp32) a gathered copy and its
        wide one, the normed and the gathered target."""
        if self.compiled_loss:
            return self.feature_dim * self.compute
        return self.feature_dim * FP32 * 3

    def projected(self) -> int:
        """The heads' outputs, alive until the loss is computed."""
        return self.foresight.heads * self.rows * self.feature_dim * self.compute

    def blocks(self, up_to: int | None = None) -> int:
        """What blocks 0 .. up_to - 1 (default all) keep."""
        return sum(self.kept_by_block(i) for i in range(self.model.depth if up_to is None else up_to))
